"""Exit codes and the one line on standard error."""

import os
import subprocess
import sys

import pytest

from backends.errors import LostPeer, UserError
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


@pytest.mark.parametrize(("tell", "debug", "says"), [(True, False, 1), (False, False, 0), (False, True, 1)])
def test_a_lost_process_is_told_by_the_rank_that_was_first(capfd, monkeypatch, tell, debug, says):
    monkeypatch.setenv("RANK", "3")
    assert run(fail(LostPeer("rank 3 lost another process", tell)), debug=debug) == 1
    text = capfd.readouterr().err
    assert text.count("moebius: rank 3 lost another process\n") == says and ("Traceback" in text) == debug


def test_interrupt_is_quiet(capfd):
    assert run(fail(KeyboardInterrupt()), debug=False) == 130
    assert capfd.readouterr() == ("", "")


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ValueError):
        run(fail(ValueError("a bug")), debug=False)


@pytest.mark.parametrize(
    "program",
    [
        "from launch.errors import run; sys.exit(run(lambda: print('figures') or 0, debug=False))",
        "from launch.errors import run; sys.exit(run(lambda: print('figures' * 9999) or 0, debug=False))",
        "from launch.cli import main; sys.exit(main(['--help']))",
    ],
)
def test_a_reader_that_has_seen_enough_gets_no_traceback(program):
    nobody, pipe = os.pipe()
    os.close(nobody)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", f"import sys; {program}"]
    ran = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(pipe)
    assert (ran.returncode, ran.stderr) == (1, "")
