"""Which layers each stage of a pipeline holds, and which stages each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    Among splits that are equally good, the one whose stages differ least.

    Args:
        costs: of each layer, in any unit.
        before: of what stands before the first layer (the embedding).
        after: of what stands behind the last (head, loss, multi-token prediction).
        stages: at most as many as layers.
    """
    layers = len(costs)
    assert 1 <= stages <= layers, "validate_layout of the config comes first"
    ends = [0.0, *accumulate(costs)]

    def cost(first: int, end: int) -> float:
        """Of a stage that holds layers first to end - 1."""
        return ends[end] - ends[first] + (before if first == 0 else 0.0) + (after if end == layers else 0.0)

    worst, _ = _split(layers, stages, cost, max)
    # Equal sums may differ in their last bit.
    limit = worst * (1 + 1e-9)
    _, counts = _split(
        layers,
        stages,
        lambda first, end: cost(first, end) ** 2 if cost(first, end) <= limit else float("inf"),
        lambda one, other: one + other,
    )
    return counts


def _split(
    layers: int,
    stages: int,
    cost: Callable[[int, int], float],
    together: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The split with the smallest cost of all stages ``together``, and that cost."""
    # best[first]: of the stages so far from the end, over layers from first on.
    best = {first: (cost(first, layers), [layers - first]) for first in range(layers)}
    for _ in range(stages - 1):
        best = {
            first: min(
                (together(cost(first, end), best[end][0]), [end - first, *best[end][1]])
                for end in range(first + 1, layers)
                if end in best
            )
            for first in range(layers)
            if any(end in best for end in range(first + 1, layers))
        }
    return best[0]
