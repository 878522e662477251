"""Timelines: simulated ones against published formulas and hand-made cases, measured ones through their files."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.errors import UserError
from parallel.pipeline import trace
from parallel.pipeline.order import SCHEDULES, default_chunks, layout
from parallel.pipeline.timeline import Durations, Span, Timeline, simulate


@pytest.mark.parametrize(("pp", "micro_batches"), [(1, 4), (2, 5), (4, 8), (4, 16)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_bubble_of_one_stage_per_rank(schedule: str, pp: int, micro_batches: int) -> None:
    """(p - 1) / (m + p - 1), Narayanan et al. 2021, section 2.2.1 (there relative to the work: (p - 1) / m)."""
    found = simulate(schedule, pp, micro_batches, 1, Durations(forward=1, input=1.5, weight=0.5))
    assert found.bubble == pytest.approx((pp - 1) / (micro_batches + pp - 1), rel=1e-12)
    assert found.total == pytest.approx(3 * (micro_batches + pp - 1), rel=1e-12)


@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaving_divides_the_bubble_by_the_chunks(chunks: int) -> None:
    """(p - 1) / (v m) of the work, Narayanan et al. 2021, section 2.2.2."""
    bubble = simulate("interleaved", 4, 8, chunks, Durations()).bubble
    assert bubble / (1 - bubble) == pytest.approx(3 / (chunks * 8), rel=1e-12)


def test_zbv_has_but_the_bubble_of_its_ends() -> None:
    """p - 1 chunk forwards on every rank, Qi et al. 2024, section 6, with a synchronous optimizer step."""
    found = simulate("zbv", 4, 8, 2, Durations())
    assert found.total == 2 * 8 * 3 + 3 and found.busy == [48.0] * 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_starts_before_what_it_needs(schedule: str) -> None:
    chunks, away = default_chunks(schedule), 0.25
    found = simulate(schedule, 4, 8, chunks, Durations(1.0, 1.25, 0.5, communication=away))
    spans = {span[:3]: (rank, span) for rank, spans in enumerate(found.ranks) for span in spans}
    assert found.layout == layout(schedule, 4, chunks) and len(spans) == sum(len(spans) for spans in found.ranks)
    for (kind, stage, micro_batch), (rank, span) in spans.items():
        wanted = [("F", stage - 1)] if kind == "F" else [("I", stage)] if kind == "W" else [("F", stage)]
        wanted += [("I", stage + 1), ("B", stage + 1)] if kind in "IB" else []
        for other in wanted:
            if (*other, micro_batch) in spans:
                there, before = spans[(*other, micro_batch)]
                assert span.start >= before.end + away * (there != rank)


def test_a_step_by_hand() -> None:
    """Two ranks, two micro-batches, forward 1, backward 2, 1 to travel."""
    found = simulate("1f1b", 2, 2, 1, Durations(1, 1, 1, communication=1))
    first, last = (
        [(f"{span.kind}{span.micro_batch}", span.start, span.end) for span in spans] for spans in found.ranks
    )
    assert first == [("F0", 0, 1), ("F1", 1, 2), ("B0", 6, 8), ("B1", 9, 11)]
    assert last == [("F0", 2, 3), ("B0", 3, 5), ("F1", 5, 6), ("B1", 6, 8)]
    assert found.total == 11 and found.busy == [6, 6] and found.bubble == pytest.approx(1 - 6 / 11)


def test_a_pair_takes_as_long_as_its_longer_part_or_as_both() -> None:
    """One rank: F0 F1, its chunks' backwards in pairs with forwards. Work 2 chunks x 3 micro-batches x 3."""
    together = simulate("dualpipev", 1, 3, 2, Durations())
    in_turn = simulate("dualpipev", 1, 3, 2, Durations(), overlap=False)
    pairs = [one for one in together.ranks[0] for other in together.ranks[0] if one.start == other.start]
    assert in_turn.total == 18 and in_turn.bubble == 0
    assert len(pairs) - len(together.ranks[0]) == 2 * 3  # of the 4 that could be, torch leaves out the first
    assert together.total == 18 - 3 and together.bubble == 0


def test_actions_at_once_count_once() -> None:
    spans = [
        Span("F", 0, 1, 1.0, 3.0),
        Span("B", 1, 0, 2.0, 5.0),
        Span("F", 0, 2, 2.5, 2.75),
        Span("W", 1, 0, 6.0, 8.0),
    ]
    found = Timeline("dualpipev", [[0, 1]], [spans])
    assert (found.total, found.busy, found.bubble) == (8.0, [6.0], 0.25)
    assert Timeline("gpipe", [[0]], [[]]).bubble == 0


HEADER = trace.Header("dualpipev", pp=2, micro_batches=4, chunks=2, step=20)


def write_trace(folder: Path) -> Timeline:
    made = simulate("dualpipev", 2, 4, 2, Durations(1.0, 1.25, 0.5))
    for rank, spans in enumerate(made.ranks):
        trace.write(folder, HEADER, rank, reversed(spans))
    return made


def test_a_trace_comes_back(tmp_path: Path) -> None:
    made = write_trace(tmp_path)
    header, found = trace.read(tmp_path)
    assert header == HEADER and found.layout == [[0, 3], [1, 2]]
    assert [set(spans) for spans in found.ranks] == [set(spans) for spans in made.ranks]
    assert found.bubble == pytest.approx(made.bubble, rel=1e-12)
    assert trace.durations(found) == Durations(1.0, 1.25, 0.5, backward=1.75)
    first, second = (tmp_path / "pipeline" / "rank-1.jsonl").read_text().splitlines()[:2]
    assert first == (
        '{"schedule": "dualpipev", "pp": 2, "microbatches": 4, "layout": [[0, 3], [1, 2]], "step": 20, "rank": 1}'
    )
    assert re.fullmatch(
        r'\{"rank": 1, "action": "W", "stage": \d, "microbatch": \d, "start": [\d.]+, "end": [\d.]+\}', second
    )


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda text: "", "rank-1.jsonl:1: is no line of a pipeline trace; trace again"),
        (lambda text: text.replace('"start"', '"begin"', 1), "rank-1.jsonl:2: is no line of a pipeline trace"),
        (lambda text: text[:-20], r"rank-1.jsonl:\d+: is no line of a pipeline trace"),
        (lambda text: text.replace('"rank": 1', '"rank": 0'), "rank-1.jsonl:1: is no line of a pipeline trace"),
        (lambda text: text.replace('"dualpipev"', '"zbw"'), "rank-1.jsonl:1: is no line of a pipeline trace"),
        (lambda text: text.replace('"step": 20', '"step": 10'), "is of another step or schedule than rank-0.jsonl"),
        (lambda text: "\n".join(text.splitlines()[:-1]), "lacks actions of its step, or has some twice"),
        (lambda text: text + text.splitlines()[-1], "lacks actions of its step, or has some twice"),
    ],
)
def test_a_damaged_trace_is_refused(tmp_path: Path, damage: Callable[[str], str], problem: str) -> None:
    write_trace(tmp_path)
    path = tmp_path / "pipeline" / "rank-1.jsonl"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=problem):
        trace.read(tmp_path)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rank-0.jsonl: there is no such file; give the directory of a run"):
        trace.read(tmp_path)
    write_trace(tmp_path)
    (tmp_path / "pipeline" / "rank-1.jsonl").unlink()
    with pytest.raises(UserError, match=r"rank-1.jsonl: there is no such file, but rank-0.jsonl tells of 2 ranks"):
        trace.read(tmp_path)
