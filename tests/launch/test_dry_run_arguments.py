"""What `moebius train --dry-run` refuses; what it finds is tested in tests/trainer and tests/distributed."""

import pytest

from launch.cli import main

TINY = ["train", "--config", "configs/tiny.yaml"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dry-run", "--rank", "1"], "--rank: there is no rank 1 among 1; use 0 to 0"),
        (["--dry-run", "--world-size", "0"], "--world-size: is 0; it must be at least 1"),
        (["--dry-run", "--world-size", "6", "parallel.expert=4"], "6 ranks do not divide into groups of 4"),
        (["--dry-run", "--imbalance", "1.5"], "--imbalance: is 1.5; it must lie between 1 and parallel.expert=1"),
        (["--dry-run", "--imbalance", "0"], "--imbalance: is 0; it must lie between 1 and parallel.expert=1"),
    ],
)
def test_what_cannot_be_predicted(arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *arguments]) == 2
    error = capfd.readouterr().err
    assert told in error and error.count("\n") == 1


def test_no_launcher(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main([*TINY, "--dry-run"]) == 2
    assert "start it without a launcher" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rank", "0"], "--rank is of --dry-run"),
        (["--world-size", "0"], "--world-size is of --dry-run"),
        (["--json"], "--json is of --dry-run"),
        (["--dry-run", "--sample"], "--dry-run trains nothing"),
        (["--dry-run", "--resume"], "--dry-run trains nothing"),
    ],
)
def test_flags_that_would_be_ignored(arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*TINY, *arguments])
    assert end.value.code == 2
    assert told in capfd.readouterr().err
