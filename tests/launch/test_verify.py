"""`moebius verify`: its help, and what every subcommand ends with."""

import argparse
import json

import pytest

from launch.verify import COMMANDS
from launch.verify.output import finish
from tests.launch.test_cli import imported, moebius
from trainer.verify.report import Report, Table


def test_help_lists_every_subcommand(capfd):
    code, out, _ = moebius(capfd, "verify", "--help")
    assert code == 0 and all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_explains_itself(capfd, name):
    code, out, _ = moebius(capfd, "verify", name, "--help")
    assert code == 0 and f"moebius verify {name}" in out
    assert name == "record" or all(flag in out for flag in ("--html", "--json", "--markdown"))


def test_a_mistyped_subcommand_is_one_line(capfd):
    code, _, err = moebius(capfd, "verify", "opps")
    assert code == 2 and err.count("\n") == 1 and "see `moebius verify --help`" in err


def test_help_and_mistypes_import_nothing_heavy():
    helps = [["verify", name, "--help"] for name in COMMANDS]
    assert imported([["verify"], ["verify", "opps"], *helps]) == []


def outputs(**more) -> argparse.Namespace:
    return argparse.Namespace(**{"html": None, "json": None, "markdown": None} | more)


def test_verdict_sentence_and_rows_are_printed(capsys):
    table = Table("Checks", ("what", "error"), [("one", 1.0), ("two", 2.0)], ("same", "different"))
    assert finish(Report("Title", "different", "two is [wrong].", [table]), outputs()) == 1
    out = capsys.readouterr().out
    assert all(text in out for text in ("Title", "Checks", "one", "two", "different: two is [wrong]."))


def test_of_a_long_table_the_terminal_shows_what_differs(capsys):
    rows = [(f"row{number}", number) for number in range(100)]
    marks = ["different" if number == 70 else "same" for number in range(100)]
    finish(Report("Title", "different", "s", [Table("Checks", ("what", "n"), rows, marks)]), outputs())
    out = capsys.readouterr().out
    assert "row70" in out and "row71" not in out and "1 of 100 rows differ" in out


def test_files_are_written_and_named(tmp_path, capsys):
    html, text = str(tmp_path / "r.html"), str(tmp_path / "r.json")
    assert finish(Report("Title", "same", "fine."), outputs(html=html, json=text)) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "same"
    assert html in capsys.readouterr().out


def test_a_bug_of_ours_is_no_difference(capfd, monkeypatch):
    monkeypatch.setattr("launch.verify.run.main", lambda argv: 1 / 0)
    code, _, err = moebius(capfd, "verify", "run")
    assert code == 2 and "ZeroDivisionError" in err


@pytest.mark.parametrize("arguments", [("layouts", "--world"), ("record", "--steps"), ("ops", "--tokens")])
@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5"])
def test_a_count_is_a_whole_number(capfd, arguments, given):
    command, flag = arguments
    code, _, err = moebius(capfd, "verify", command, "--config", "configs/tiny.yaml", f"{flag}={given}")
    assert code == 2 and f"{flag}: '{given}' is not a whole number of 1 or more" in err
