"""Exit codes and the one line on standard error."""

import pytest

from backends.errors import UserError
from launch.errors import run


def fail(error: BaseException):
    def command() -> int:
        raise error

    return command


def test_success_keeps_its_code(capfd):
    assert run(lambda: 0, debug=False) == 0
    assert capfd.readouterr() == ("", "")


def test_user_error_is_one_line_even_when_its_message_is_not(capfd):
    assert run(fail(UserError("x.yaml: seed: is\n  -1;\tset it")), debug=False) == 2
    assert capfd.readouterr() == ("", "moebius: x.yaml: seed: is -1; set it\n")


@pytest.mark.parametrize(("rank", "says"), [("0", True), ("1", False)])
def test_only_the_first_rank_speaks(capfd, monkeypatch, rank, says):
    monkeypatch.setenv("RANK", rank)
    assert run(fail(UserError("no")), debug=False) == 2
    assert bool(capfd.readouterr().err) == says


def test_debug_shows_the_traceback_of_every_rank(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert run(fail(UserError("no")), debug=True) == 2
    text = capfd.readouterr().err
    assert "Traceback" in text and text.endswith("moebius: no\n")


def test_interrupt_is_quiet(capfd):
    assert run(fail(KeyboardInterrupt()), debug=False) == 130
    assert capfd.readouterr() == ("", "")


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ValueError):
        run(fail(ValueError("a bug")), debug=False)
