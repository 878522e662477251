"""What a pipeline really did in one step: a file per rank in the run directory, and the timeline that they give.

``<run_dir>/pipeline/rank-<n>.jsonl`` holds JSON objects, one a line. The first says what ran::

    {"schedule": "zbv", "pp": 2, "microbatches": 4, "layout": [[0, 3], [1, 2]], "step": 20, "rank": 0}

``layout`` lists the stages of each rank, and ``rank`` is the place in the pipeline whose actions follow in any order,
in seconds since the step began on that rank::

    {"rank": 0, "action": "F", "stage": 0, "microbatch": 3, "start": 0.0125, "end": 0.0211}

``action`` is a kind of :class:`parallel.pipeline.order.Action`. Waiting for other ranks belongs to no action.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from backends.errors import UserError
from parallel.pipeline.order import layout
from parallel.pipeline.timeline import Durations, Span, Timeline

FOLDER = "pipeline"
T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """What ran, and which step of the run it was."""

    schedule: str
    pp: int
    micro_batches: int
    chunks: int
    step: int


def write(run_dir: str | Path, header: Header, rank: int, spans: Iterable[Span]) -> None:
    """Write one rank's file, in place of an older one.

    Args:
        rank: the place in the pipeline. Of several pipelines (data parallelism) one may write.
        spans: seconds since the step began here; anything with the fields of a ``Span``.
    """
    first = {
        "schedule": header.schedule,
        "pp": header.pp,
        "microbatches": header.micro_batches,
        "layout": layout(header.schedule, header.pp, header.chunks),
        "step": header.step,
        "rank": rank,
    }
    lines = [
        {
            "rank": rank,
            "action": span.kind,
            "stage": span.stage,
            "microbatch": span.micro_batch,
            "start": round(span.start, 7),
            "end": round(span.end, 7),
        }
        for span in spans
    ]
    path = _file(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in [first, *lines]))
    os.replace(partial, path)


def read(run_dir: str | Path) -> tuple[Header, Timeline]:
    """The header and the timeline of a run's trace.

    Raises:
        UserError: there is no trace, it is damaged, a rank's file is missing, or the files are of different steps.
    """
    first = _file(run_dir, 0)
    if not first.is_file():
        raise UserError(f"{first}: there is no such file; give the directory of a run that traced its pipeline")
    header, _ = _read_rank(first, 0)
    ranks = []
    for rank in range(header.pp):
        path = _file(run_dir, rank)
        if not path.is_file():
            raise UserError(f"{path}: there is no such file, but {first.name} tells of {header.pp} ranks; trace again")
        theirs, spans = _read_rank(path, rank)
        if theirs != header:
            raise UserError(f"{path}: is of another step or schedule than {first.name}; trace again")
        ranks.append(sorted(spans, key=lambda span: span.start))
    return header, Timeline(header.schedule, layout(header.schedule, header.pp, header.chunks), ranks)


def durations(timeline: Timeline) -> Durations:
    """The mean duration of each kind of action: what :func:`parallel.pipeline.timeline.simulate` takes.

    Communication counts as 0, so that a simulation with these tells what the schedule and equal stages would give.
    """

    def mean(*kinds: str) -> float:
        found = [span.end - span.start for spans in timeline.ranks for span in spans if span.kind in kinds]
        return fmean(found) if found else 0.0

    return Durations(mean("F"), mean("I"), mean("W"), mean("B"))


def _file(run_dir: str | Path, rank: int) -> Path:
    return Path(run_dir, FOLDER, f"rank-{rank}.jsonl")


def _read_rank(path: Path, rank: int) -> tuple[Header, list[Span]]:
    """One rank's file, in which every stage has gone forward and backward once with every micro-batch."""
    lines = path.read_text(encoding="utf-8").splitlines() or [""]
    header, stages = _line(path, 1, lines[0], lambda line: _header(line, rank))
    spans = [_line(path, number, text, _span) for number, text in enumerate(lines[1:], start=2)]
    # A "B" is an "I" and a "W" in one.
    done = [(kind, span.stage, span.micro_batch) for span in spans for kind in {"B": "IW"}.get(span.kind, span.kind)]
    if sorted(done) != sorted(product("FIW", stages, range(header.micro_batches))):
        raise UserError(f"{path}: lacks actions of its step, or has some twice; trace again")
    return header, spans


def _line(path: Path, number: int, text: str, meaning: Callable[[dict[str, Any]], T]) -> T:
    try:
        return meaning(json.loads(text))
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{path}:{number}: is no line of a pipeline trace; trace again") from None


def _header(line: dict[str, Any], rank: int) -> tuple[Header, list[int]]:
    """The header and the rank's stages."""
    stages = line["layout"]
    header = Header(line["schedule"], line["pp"], line["microbatches"], len(stages[0]), line["step"])
    if stages != layout(header.schedule, header.pp, header.chunks) or line["rank"] != rank:
        raise ValueError
    return header, stages[rank]


def _span(line: dict[str, Any]) -> Span:
    return Span(line["action"], line["stage"], line["microbatch"], float(line["start"]), float(line["end"]))
