"""benchmarks/bubble.py at a size that tells nothing about time: that every schedule runs, and what is printed."""

import re

import pytest

from benchmarks import bubble
from parallel.pipeline.order import SCHEDULES


def test_the_table(capfd: pytest.CaptureFixture[str]) -> None:
    code = bubble.main(["--pp", "2", "--microbatches", "4", "--milliseconds", "1", "--steps", "1"])
    out, err = capfd.readouterr()
    assert code == 0, err
    rows = [re.split(r"  +", line.strip()) for line in out.splitlines()[1:]]
    assert [row[0] for row in rows] == [*list(SCHEDULES)[:-1], "dualpipev, pairs in turn", "dualpipev, pairs at once"]
    planned = {row[0]: (float(row[2]), row[4]) for row in rows}
    # (p - 1) / (m + p - 1); 15 ms of 12 ms work, both of which show that chunks share a rank's millisecond.
    assert planned["1f1b"] == (0.2, "0.015 s")
    assert planned["zbv"] == (0.04, "0.013 s")  # 12.5
    assert all(0 < float(row[3]) < 1 and float(row[5].split()[0]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--pp", "4", "--microbatches", "6"], "bubble: dualpipev needs at least 8 micro-batches on 4 ranks"),
        (["--pp", "1"], "bubble: 1 process has no pipeline; give --pp of at least 2"),
        (["--steps", "0"], "bubble: nothing to measure; give --steps and --milliseconds of more than 0"),
        (["--milliseconds", "-1"], "bubble: forward cannot take -0.001; use a number of 0 or more"),
    ],
)
def test_bad_input_is_one_line(capfd: pytest.CaptureFixture[str], arguments: list[str], problem: str) -> None:
    assert bubble.main(arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"moebius: {problem}") and err.count("\n") == 1
