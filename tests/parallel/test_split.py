"""Layers to stages: as even as they can be, every stage with a layer, the ends heavier for what stands there."""

from itertools import combinations, pairwise

import pytest

from parallel.pipeline.order import SCHEDULES, layout
from parallel.pipeline.pipeline import held_by
from parallel.pipeline.split import Part, balanced, parts


def worst(counts: list[int], costs: list[float], before: float, after: float) -> float:
    """Cost of the costliest stage."""
    stages, first = [], 0
    for count in counts:
        stages.append(sum(costs[first : first + count]))
        first += count
    stages[0] += before
    stages[-1] += after
    return max(stages)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (1.0, 4.0), (9.0, 0.5)])
def test_no_other_split_is_better(stages: int, before: float, after: float) -> None:
    costs = [1.0, 1.0, 1.0, 3.0, 3.0, 2.5, 3.0, 3.0, 1.0]
    counts = balanced(costs, before, after, stages)
    assert len(counts) == stages and sum(counts) == len(costs) and min(counts) >= 1
    every = (
        [b - a for a, b in pairwise((0, *cuts, len(costs)))] for cuts in combinations(range(1, len(costs)), stages - 1)
    )
    assert worst(counts, costs, before, after) == min(worst(other, costs, before, after) for other in every)


def test_equally_good_splits_are_as_even_as_can_be() -> None:
    assert sorted(balanced([1.0] * 7, 0.0, 0.0, 3)) == [2, 2, 3]


def test_a_heavy_head_has_fewer_layers_before_it() -> None:
    counts = balanced([1.0] * 8, 1.0, 3.0, 4)
    # At best the last stage costs 4; the seven others then lie as even as three stages, one with 1 more, can have them.
    assert counts[-1] == 1 and sorted([counts[0] + 1, counts[1], counts[2]]) == [2, 3, 3]


def test_parts_follow_each_other() -> None:
    assert parts([2, 1, 3]) == [
        Part(range(2), True, False),
        Part(range(2, 3), False, False),
        Part(range(3, 6), False, True),
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_hold_every_stage_once(schedule: str) -> None:
    chunks = SCHEDULES[schedule].chunks or 3
    held = [held_by(rank, 4, [1] * 4 * chunks, schedule) for rank in range(4)]
    assert [[number for number, _ in mine] for mine in held] == layout(schedule, 4, chunks)
    layers = sorted(layer for mine in held for _, part in mine for layer in part.layers)
    assert layers == list(range(4 * chunks))
