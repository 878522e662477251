"""When each rank of a pipeline does what: simulated from a schedule's order, or measured. The bubble is what is idle.

Times are in any one unit when simulated, and in seconds when measured.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from parallel.pipeline.order import Action, layout, order


class Span(NamedTuple):
    """An action and when it ran, since the step's start."""

    kind: str  # as in parallel.pipeline.order.Action
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Durations:
    """How long one stage takes for one micro-batch.

    Raises:
        ValueError: one of them is no time.
    """

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    backward: float | None = None  # input and weight gradients in one; None is their sum
    communication: float = 0.0  # from a stage to the next one when that is on another rank; the sender does not wait

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} cannot take {value:g}; use a number of 0 or more")

    def of(self, kind: str) -> float:
        """How long an action of this kind takes."""
        whole = self.input + self.weight if self.backward is None else self.backward
        return {"F": self.forward, "I": self.input, "W": self.weight, "B": whole}[kind]


@dataclass(frozen=True)
class Timeline:
    """Spans of every rank in the order in which they began."""

    schedule: str
    layout: list[list[int]]  # the stages of each rank
    ranks: list[list[Span]]

    @property
    def total(self) -> float:
        """From the step's start to the end of the last action of any rank."""
        return max((span.end for spans in self.ranks for span in spans), default=0.0)

    @property
    def busy(self) -> list[float]:
        """How long each rank does something; two actions at once count once."""
        return [covered(spans) for spans in self.ranks]

    @property
    def overlaps(self) -> bool:
        """Whether a rank ever does two things at once."""
        return any(sum(span.end - span.start for span in spans) > covered(spans) * (1 + 1e-6) for spans in self.ranks)

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which they are idle: 1 - busy / total."""
        return 1 - fmean(self.busy) / self.total if self.total else 0.0


def simulate(
    schedule: str, pp: int, micro_batches: int, chunks: int, durations: Durations, overlap: bool = True
) -> Timeline:
    """The timeline of a step in which every stage takes the same ``durations``.

    A rank takes its steps in order, each as soon as what it needs is there: a forward needs the output of the stage
    before, a backward the input gradient of the stage behind, and weight gradients the backward that left them over.

    Args:
        overlap: how a forward and a backward run that the schedule pairs. True: at once and without slowing each
            other down, from when both can start; the pair takes as long as the longer one. False: one after the
            other, the forward first, as torch does by default. Either way their results leave when both are done.

    Raises:
        ValueError: the schedule cannot run like this; see :func:`parallel.pipeline.order.check`.
    """
    waiting = [deque(steps) for steps in order(schedule, pp, micro_batches, chunks)]
    stages = layout(schedule, pp, chunks)
    rank_of = {stage: rank for rank, held in enumerate(stages) for stage in held}
    ranks: list[list[Span]] = [[] for _ in range(pp)]
    done: dict[Action, float] = {}

    def ready(action: Action) -> float:
        """When the action could start; infinity if what it needs has not been placed yet."""
        needed = _needed(action, last=pp * chunks - 1)
        if not needed:
            return 0.0
        away = rank_of[needed[0].stage] != rank_of[action.stage]
        found = [done[each] for each in needed if each in done]
        return found[0] + durations.communication * away if found else math.inf

    progress = True
    while progress:
        progress = False
        for spans, steps in zip(ranks, waiting, strict=True):
            while steps and all(ready(action) < math.inf for action in steps[0]):
                step, progress = steps.popleft(), True
                free = max((span.end for span in spans[-2:]), default=0.0)
                together = max(ready(action) for action in step) if overlap else 0.0
                for action in step:
                    start = max(free, together, ready(action))
                    spans.append(Span(*action, start, start + durations.of(action.kind)))
                    free = free if overlap else spans[-1].end
                for action in step:
                    done[action] = max(span.end for span in spans[-len(step) :])
    assert not any(waiting), "torch checks that its orders end"
    return Timeline(schedule, stages, ranks)


def _needed(action: Action, last: int) -> list[Action]:
    """What has to be done before, for lack of which a rank may wait: any one of these, or nothing if there are none."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind == "F":
        return [Action("F", stage - 1, micro_batch)] if stage > 0 else []
    if action.kind == "W":
        return [Action("I", stage, micro_batch)]
    if stage == last:
        return [Action("F", stage, micro_batch)]
    return [Action("I", stage + 1, micro_batch), Action("B", stage + 1, micro_batch)]


def covered(spans: Sequence[Span]) -> float:
    """Length of the union of the spans."""
    covered, reached = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return covered
