"""Orders of the schedules: they are torch's, they can be run, and what cannot is refused with what can."""

import re
from itertools import product
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from parallel.pipeline.order import SCHEDULES, Action, check, default_chunks, layout, order

LAYOUTS = [
    (schedule, pp, micro_batches, chunks)
    for schedule, pp, micro_batches, chunks in product(SCHEDULES, (1, 2, 3, 4), range(1, 14), (1, 2, 3))
]
MULTI = [
    name for name in SCHEDULES if issubclass(get_schedule_class(SCHEDULES[name].torch_name), PipelineScheduleMulti)
]


def torch_takes(schedule: str, pp: int, micro_batches: int, chunks: int) -> bool:
    """Whether torch's class can be made of so many stages, which lays out their communication, too."""
    kind = get_schedule_class(SCHEDULES[schedule].torch_name)
    stages = [
        SimpleNamespace(stage_index=i, num_stages=pp * chunks, group_size=pp, group_rank=0, submod=None)
        for i in range(chunks)
    ]
    try:
        kind(stages if schedule in MULTI else stages[0], micro_batches)
    except ValueError:
        return False
    return schedule in MULTI or chunks == 1


def ours_takes(schedule: str, pp: int, micro_batches: int, chunks: int) -> bool:
    try:
        check(schedule, pp, micro_batches, chunks)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_we_refuse_is_what_torch_refuses(schedule: str) -> None:
    found = {layout[1:]: ours_takes(*layout) for layout in LAYOUTS if layout[0] == schedule}
    assert found == {layout[1:]: torch_takes(*layout) for layout in LAYOUTS if layout[0] == schedule}
    assert {True, False} <= set(found.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("pp", "micro_batches"), [(1, 3), (2, 4), (3, 7), (4, 8)])
def test_every_stage_does_everything_once_and_in_order(schedule: str, pp: int, micro_batches: int) -> None:
    chunks = default_chunks(schedule)
    if not ours_takes(schedule, pp, micro_batches, chunks):
        micro_batches = 2 * pp
    held = layout(schedule, pp, chunks)
    assert sorted(stage for stages in held for stage in stages) == list(range(pp * chunks))
    for stages, steps in zip(held, order(schedule, pp, micro_batches, chunks), strict=True):
        actions = [action for step in steps for action in step]
        assert len(actions) == len(set(actions))
        place = {action: index for index, action in enumerate(actions)}
        for stage, micro_batch in product(stages, range(micro_batches)):
            first = place.pop(Action("F", stage, micro_batch))
            if Action("B", stage, micro_batch) in place:
                assert first < place.pop(Action("B", stage, micro_batch))
            else:
                then = place.pop(Action("I", stage, micro_batch))
                assert first < then < place.pop(Action("W", stage, micro_batch))
        assert not place
    if not SCHEDULES[schedule].splits_backward:
        assert {action.kind for step in steps for action in step} == {"F", "B"}


def test_only_dualpipev_pairs_and_it_pairs_a_forward_with_a_backward() -> None:
    for schedule in SCHEDULES:
        steps = [step for rank in order(schedule, 4, 8, default_chunks(schedule)) for step in rank]
        pairs = [step for step in steps if len(step) > 1]
        assert bool(pairs) == (schedule == "dualpipev")
        assert all((pair[0].kind, pair[1].kind) == ("F", "B") and pair[0].stage != pair[1].stage for pair in pairs)


def test_the_orders_of_1f1b() -> None:
    """By hand: the last rank alternates from the first micro-batch on, which torch's published order gets wrong."""
    first, last = ([f"{action.kind}{action.micro_batch}" for (action,) in steps] for steps in order("1f1b", 2, 3, 1))
    assert first == ["F0", "F1", "B0", "F2", "B1", "B2"]
    assert last == ["F0", "B0", "F1", "B1", "F2", "B2"]


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (("zbw", 4, 8, 2), "there is no schedule 'zbw'; use one of gpipe, 1f1b, interleaved, "),
        (("zbv", 0, 8, 2), "zbv cannot run with 0 ranks; use at least 1"),
        (("zbv", 4, 8, 1), "zbv needs exactly 2 chunks per rank, not 1; use 2"),
        (("1f1b", 4, 8, 2), "1f1b needs exactly 1 chunk per rank, not 2; use 1"),
        (("1f1b", 4, 3, 1), "1f1b needs at least 4 micro-batches on 4 ranks, one for each, not 3; use 4"),
        (
            ("dualpipev", 4, 7, 2),
            "dualpipev needs at least 8 micro-batches on 4 ranks, one for each stage, not 7; use 8",
        ),
        (("interleaved", 4, 13, 2), "13 do not divide into 3 equal rounds; use 12 or 15"),
    ],
)
def test_a_refusal_names_what_works(layout: tuple[str, int, int, int], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        check(*layout)
