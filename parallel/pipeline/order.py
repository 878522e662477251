"""What each rank of a pipeline does, and in which order: asked of torch's own schedule classes, without any process.

A *stage* is a run of layers; stages are numbered in the order in which a token passes them. A rank holds one *chunk*
or more, each of which is a stage. Nothing here imports torch before an order is asked for, so that help is instant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Schedule:
    """What is fixed about a schedule."""

    torch_name: str  # as torch.distributed.pipelining.schedules.get_schedule_class takes it
    chunks: int | None  # per rank; None is any number
    v_shaped: bool  # rank r holds stage r and, on the way back, 2 * pp - 1 - r; otherwise r, r + pp, r + 2 * pp, ...
    splits_backward: bool  # input and weight gradients are separate actions somewhere
    overlaps: bool = False  # some forwards and backwards come as pairs that may run at once


SCHEDULES = {
    "gpipe": Schedule("GPipe", 1, False, False),
    "1f1b": Schedule("1F1B", 1, False, False),
    "interleaved": Schedule("Interleaved1F1B", None, False, False),
    "interleaved-zero-bubble": Schedule("InterleavedZeroBubble", None, False, True),
    "zbv": Schedule("ZBVZeroBubble", 2, True, True),
    "dualpipev": Schedule("DualPipeV", 2, True, True, overlaps=True),
}


class Action(NamedTuple):
    """One piece of work on one micro-batch.

    ``kind`` is "F" for a forward, "I" for a backward that gives the gradient of the stage's input only, "W" for the
    gradients of its weights that "I" left over, and "B" for both at once.
    """

    kind: str
    stage: int
    micro_batch: int


# One action, or a forward and a backward of another stage and micro-batch that may run at once (OVERLAP_F_B).
Step = tuple[Action, ...]


def default_chunks(schedule: str) -> int:
    """Chunks per rank when nobody says: the least that the schedule gains from."""
    return SCHEDULES[schedule].chunks or 2


def check(schedule: str, pp: int, micro_batches: int, chunks: int) -> None:
    """Whether ``schedule`` can run ``micro_batches`` a step on ``pp`` ranks of ``chunks`` stages each.

    Raises:
        ValueError: it cannot; one line that says why and the nearest values that work.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"there is no schedule '{schedule}'; use one of {', '.join(SCHEDULES)}")
    for name, value in (("ranks", pp), ("micro-batches", micro_batches), ("chunks", chunks)):
        if value < 1:
            raise ValueError(f"{schedule} cannot run with {value} {name}; use at least 1")
    wanted = SCHEDULES[schedule].chunks
    if wanted not in (None, chunks):
        raise ValueError(
            f"{schedule} needs exactly {wanted} chunk{'s' * (wanted != 1)} per rank, not {chunks}; use {wanted}"
        )
    problem = _problem(schedule, pp, micro_batches)
    if problem is not None:
        nearest = _nearest(lambda each: _problem(schedule, pp, each) is None, micro_batches)
        raise ValueError(f"{schedule} {problem}; use {nearest}")


def layout(schedule: str, pp: int, chunks: int) -> list[list[int]]:
    """The stages of each rank, in ascending order."""
    if SCHEDULES[schedule].v_shaped:
        return [[rank, 2 * pp - 1 - rank] for rank in range(pp)]
    return [[rank + chunk * pp for chunk in range(chunks)] for rank in range(pp)]


def order(schedule: str, pp: int, micro_batches: int, chunks: int) -> list[list[Step]]:
    """The steps of every rank, in the order in which torch runs them.

    Raises:
        ValueError: see :func:`check`.
    """
    check(schedule, pp, micro_batches, chunks)
    from torch.distributed.pipelining import schedules

    made_by = schedules.get_schedule_class(SCHEDULES[schedule].torch_name)
    if issubclass(made_by, schedules.PipelineScheduleSingle):
        return [_recorded(made_by, pp, micro_batches, rank) for rank in range(pp)]
    stages = [_Stage(pp, pp * chunks, rank=0, index=chunk) for chunk in range(chunks)]
    planned = made_by(stages, micro_batches, loss_fn=_loss).pipeline_order
    return [[_step(action) for action in planned[rank] if action is not None] for rank in range(pp)]


class _Stage:
    """As much of a pipeline stage as torch's schedules look at; it writes down what it is told to do."""

    is_last = False  # so that nobody asks for a loss
    is_first = False
    submod = None
    device = "cpu"

    def __init__(self, pp: int, num_stages: int, rank: int, index: int) -> None:
        self.group_size, self.num_stages, self.group_rank, self.stage_index = pp, num_stages, rank, index
        self.done: list[Step] = []

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self.done.append((Action("F", self.stage_index, micro_batch),))

    def backward_one_chunk(self, micro_batch: int, **_: Any) -> None:
        self.done.append((Action("B", self.stage_index, micro_batch),))

    def no_operations(self, *_: Any, **__: Any) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_operations
    _get_init_p2p_neighbors_ops = _prepare_forward_infra = _prepare_backward_infra = no_operations
    clear_runtime_states = perform_reduce_grad = no_operations


def _recorded(made_by: Any, pp: int, micro_batches: int, rank: int) -> list[Step]:
    """What a schedule of one stage per rank really does.

    Such a schedule does not run from the order that it publishes, and torch 2.13's 1F1B publishes a wrong one: its
    last rank would begin with micro-batch 1.
    """
    stage = _Stage(pp, pp, rank, rank)
    made_by(stage, micro_batches, loss_fn=_loss).step()
    return stage.done


def _loss(*_: Any) -> None:
    raise AssertionError("no stage here is the last")


def _step(action: Any) -> Step:
    """Torch's action as ours."""
    if action.sub_actions is not None:
        return tuple(step for part in action.sub_actions for step in _step(part))
    return (Action(action.computation_type.value, action.stage_index, action.microbatch_index),)


def _problem(schedule: str, pp: int, micro_batches: int) -> str | None:
    """Why the schedule cannot run that many micro-batches a step, if it cannot."""
    rounds = max(1, micro_batches // pp)
    if schedule == "1f1b" and micro_batches < pp:
        return f"needs at least {pp} micro-batches on {pp} ranks, one for each, not {micro_batches}"
    if schedule == "dualpipev" and micro_batches < 2 * pp:
        return f"needs at least {2 * pp} micro-batches on {pp} ranks, one for each stage, not {micro_batches}"
    if schedule in ("interleaved", "interleaved-zero-bubble") and micro_batches % rounds:
        return f"runs in rounds of {pp} micro-batches or more: {micro_batches} do not divide into {rounds} equal rounds"
    return None


def _nearest(fits: Callable[[int], bool], value: int) -> str:
    """The nearest number below ``value`` that fits, if any, and the nearest above."""
    below = next((each for each in range(value - 1, 0, -1) if fits(each)), None)
    above = next(each for each in count(value + 1) if fits(each))
    return f"{above}" if below is None else f"{below} or {above}"
