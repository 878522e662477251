"""Which layers each stage of a pipeline holds, and which stages each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Part:
    """What one stage holds: some layers, and at the ends the embedding or the norm, head and loss."""

    layers: range
    first: bool
    last: bool


def whole(layers: int) -> Part:
    """The model in one piece."""
    return Part(range(layers), first=True, last=True)


def parts(counts: Sequence[int]) -> list[Part]:
    """The stages that hold these numbers of layers, in order."""
    ends = list(accumulate(counts))
    return [
        Part(range(end - count, end), first=stage == 0, last=stage == len(counts) - 1)
        for stage, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]


def balanced(costs: Sequence[float], before: float, after: float, stages: int) -> list[int]:
    """Layers per stage so that the costliest stage costs as little as it can, and every stage has a layer.

    Among splits that are equally good the early stages are the larger ones.

    Args:
        costs: of each layer, in any unit.
        before: of what stands before the first layer (the embedding).
        after: of what stands behind the last (head, loss, multi-token prediction).
        stages: at most as many as layers.
    """
    layers = len(costs)
    assert 1 <= stages <= layers, "validate_layout of the config comes first"
    ends = [0.0, *accumulate(costs)]

    def cost(first: int, last: int) -> float:
        """Of a stage that holds layers first to last - 1."""
        return ends[last] - ends[first] + (before if first == 0 else 0.0) + (after if last == layers else 0.0)

    # best[n][k]: the smallest possible maximum over k stages that hold the last layers from n on, and the size of
    # the first of them.
    best: list[list[tuple[float, int]]] = [[(float("inf"), 0)] * (stages + 1) for _ in range(layers + 1)]
    for first in range(layers):
        best[first][1] = (cost(first, layers), layers - first)
    for k in range(2, stages + 1):
        for first in range(layers - k + 1):
            best[first][k] = min(
                ((max(cost(first, end), best[end][k - 1][0]), end - first) for end in range(first + 1, layers - k + 2)),
                key=lambda choice: (choice[0], -choice[1]),
            )
    counts, first = [], 0
    for k in range(stages, 0, -1):
        counts.append(best[first][k][1])
        first += counts[-1]
    return counts
