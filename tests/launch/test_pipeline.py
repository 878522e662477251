"""`moebius pipeline`: drawings in the terminal and as pictures, of plans and of traces."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.timeline import legend, rows
from parallel.pipeline import trace
from parallel.pipeline.order import SCHEDULES, default_chunks
from parallel.pipeline.timeline import Durations, Span, Timeline, simulate
from tests.distributed.ranks import ROOT


def moebius(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["pipeline", *arguments])
    except SystemExit as exit:  # argparse
        code = int(exit.code or 0)
    return code, *capfd.readouterr()


def plan(schedule: str, **more: int) -> list[str]:
    sizes = {"pp": 4, "microbatches": 8, **more}
    return ["--schedule", schedule, *(word for name, value in sizes.items() for word in (f"--{name}", str(value)))]


def test_a_plan(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = moebius(capfd, *plan("1f1b", pp=2, microbatches=2))
    assert (code, err) == (0, "")
    assert out == (
        "1f1b, 2 ranks, 2 micro-batches\n\n"
        "rank 0  F0 F1 ......B0--- ...B1---\n"
        "rank 1  ...F0 B0--- F1 B1--- ......\n\n"
        "F forward   B backward   . idle\n\n"
        "           bubble  step\n"
        "in theory   33.3%     9\n"
    )


@pytest.mark.parametrize("width", [80, 133])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("micro_batches", [8, 16])
def test_every_action_can_be_read_in_a_narrow_terminal(schedule: str, micro_batches: int, width: int) -> None:
    made = simulate(schedule, 4, micro_batches, default_chunks(schedule), Durations())
    lines = [line.plain for line in rows(made, width)]
    assert max(len(line) for line in lines) <= width
    for rank, spans in enumerate(made.ranks):
        row = "".join(line[8:].ljust(width - 8) for line in lines if line.startswith(f"rank {rank}"))
        shown = re.findall(r"[FIWB]\d+", row.upper())
        assert sorted(shown) == sorted(f"{span.kind}{span.micro_batch}" for span in spans)
        second = [f"{span.kind}{span.micro_batch}" for span in spans if span.stage != made.layout[rank][0]]
        assert sorted(re.findall(r"[fiwb]\d+", row)) == sorted(label.lower() for label in second)


def test_columns_are_time() -> None:
    """Idle time, unequal actions, and one that is too short for its number."""
    spans = [Span("F", 0, 0, 1.0, 2.0), Span("B", 0, 0, 2.5, 5.5), Span("F", 0, 1, 5.5, 5.8), Span("B", 0, 1, 6.0, 7.0)]
    (line,) = rows(Timeline("gpipe", [[0]], [[*spans, *(Span("F", 0, 9, 7.0 + i, 8.0 + i) for i in range(20))]]), 110)
    assert line.plain.startswith("rank 0  ...F0 ..B0----- F.B1 F9 F9 ")


def test_the_legend_names_what_is_there() -> None:
    assert legend(simulate("gpipe", 2, 2, 1, Durations())).plain == "F forward   B backward   . idle"
    everything = legend(simulate("dualpipev", 2, 4, 2, Durations())).plain
    for words in ("I input gradients", "W weight gradients", "F+B both at once", "lower case: the second chunk"):
        assert words in everything
    assert "every second chunk" in legend(simulate("interleaved", 2, 4, 3, Durations())).plain


def test_durations_count(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = moebius(capfd, *plan("1f1b"), "--forward", "2", "--input", "3", "--weight", "1.5")
    assert re.search(r"in theory +27.3% +71.5\n", out)  # (8 + 3) * 6.5
    _, out, _ = moebius(capfd, *plan("gpipe", pp=2, microbatches=1), "--communication", "0.25")
    assert re.search(r"in theory +53.8% +6.5\n", out)
    together, in_turn = (moebius(capfd, *plan("dualpipev"), *more)[1] for more in ([], ["--no-overlap"]))
    assert "F7+b3" in together and "F7+b3" not in in_turn and " 44\n" in together and " 54\n" in in_turn
    assert " 66\n" not in moebius(capfd, *plan("interleaved", chunks=3))[1]


def test_a_trace_stands_beside_its_theory(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Rank 1 waited 1 ms in the middle."""
    header = trace.Header("gpipe", pp=2, micro_batches=1, chunks=1, step=20)
    trace.write(tmp_path, header, 0, [Span("F", 0, 0, 0.0, 0.002), Span("B", 0, 0, 0.009, 0.013)])
    trace.write(tmp_path, header, 1, [Span("F", 1, 0, 0.002, 0.004), Span("B", 1, 0, 0.005, 0.009)])
    picture = tmp_path / "trace.svg"
    code, out, err = moebius(capfd, "--trace", str(tmp_path), "--out", str(picture))
    assert (code, err) == (0, "")
    assert out.startswith(f"gpipe, 2 ranks, 1 micro-batch, step 20 of {tmp_path}\n\nrank 0  F0 ")
    assert re.search(r"measured +53.8% +13.0 ms\nin theory +50.0% +12.0 ms\n", out)  # 1 - 6 / 13
    drawn = picture.read_text()
    assert "bubble 53.8% measured" in drawn and "bubble 50.0% in theory" in drawn and "time (s)" in drawn


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture(capfd: pytest.CaptureFixture[str], tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"plan.{suffix}"
    code, printed, _ = moebius(capfd, *plan("dualpipev", pp=2, microbatches=4), "--out", str(out))
    assert code == 0 and printed.endswith(f"\n{out}\n")
    if suffix == "png":
        assert out.read_bytes().startswith(b"\x89PNG")
        return
    first = out.read_text()
    for words in ("rank 1", "forward", "weight gradients", "bubble "):
        assert words in first
    moebius(capfd, *plan("dualpipev", pp=2, microbatches=4), "--out", str(out))
    assert out.read_text() == first  # so that a picture in a repository changes when it has to


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from launch.cli import main\n"
        "try: main(['pipeline', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'rich', 'matplotlib'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--microbatches" in ran.stdout and ran.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "one of the arguments --schedule --trace is required; see `moebius pipeline --help`"),
        (["--schedule", "zbv", "--pp", "4"], "argument --schedule: needs --microbatches, too; see `moebius"),
        (["--trace", "x", "--forward", "2"], "argument --forward: not allowed with argument --trace, which tells it"),
        ([*plan("zbv"), "--no-overlap"], "argument --no-overlap: zbv overlaps nothing; only dualpipev does"),
        (plan("zbv", pp="four"), "argument --pp: invalid int value: 'four'"),  # type: ignore[arg-type]
        (plan("dualpipev", microbatches=6), "pipeline: dualpipev needs at least 8 micro-batches on 4 ranks"),
        ([*plan("zbv"), "--input", "-1"], "pipeline: input cannot take -1; use a number of 0 or more"),
        ([*plan("gpipe"), "--forward=0", "--input=0", "--weight=0"], "pipeline: nothing takes any time"),
        ([*plan("gpipe"), "--out", "nowhere/plan.svg"], "--out nowhere/plan.svg: [Errno 2]"),
        ([*plan("gpipe"), "--out", "plan.mp3"], "--out plan.mp3: Format 'mp3' is not supported"),
        (["--trace", "nowhere"], "nowhere/pipeline/rank-0.jsonl: there is no such file; give the directory of a run"),
    ],
)
def test_bad_input_is_one_line(capfd: pytest.CaptureFixture[str], arguments: list[str], problem: str) -> None:
    code, _, err = moebius(capfd, *arguments)
    assert code == 2 and err.startswith(f"moebius: {problem}") and err.count("\n") == 1
