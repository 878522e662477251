"""DualPipeV's overlap: the forward of one micro-batch and the backward of another, at once on one rank.

torch calls such a pair OVERLAP_F_B and runs its parts one after the other. Here the backward gets a thread of its own,
so that one part computes while the other waits for its tokens to travel (DeepSeek-V3, arXiv 2412.19437, section 3.2.1).

What a stage has to keep to:

- Ranks must call the collectives of a process group in one order, which two threads do not have. So the experts'
  all-to-all of a backward must use another group than that of a forward; the dispatcher has one for each. The
  pipeline's own sends and receives stay in the thread that called, in torch's order.
- Parts of a pair are of different stages and must not write to the same tensor.
- Nothing random may happen in a forward: the generator is the process's.

On an accelerator each part launches into the stream of its stage (parallel/pipeline/lane.py). Both begin after what was
launched before the pair, and what is launched after it waits for both.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.pipelining.schedules import (
    FORWARD,
    OVERLAP_F_B,
    _Action,
    _PipelineContext,
    _PipelineScheduleRuntime,
)

from parallel.pipeline.lane import Lane


def overlap(schedule: _PipelineScheduleRuntime) -> None:
    """Let ``schedule`` run its pairs at once from now on. Gradients are the same to the bit.

    Args:
        schedule: one of several stages per rank; only DualPipeV has pairs. Its ``step`` and ``eval`` must be called
            with ``return_outputs=False`` and without ``loss_kwargs``: torch tells a function of ours of neither.
    """
    schedule.register_custom_function(OVERLAP_F_B, Pairs(schedule._stages[0].device))


class Pairs:
    """What torch calls in place of its own handling of a pair."""

    def __init__(self, device: torch.device) -> None:
        # One thread for all pairs: a new one would also start a new team of OpenMP threads.
        self._backwards = ThreadPoolExecutor(1, "backward", _enter, (device,))

    def __call__(self, action: _Action, ctx: _PipelineContext) -> None:
        """Run both parts; an exception of either is raised when both have ended."""
        assert action.sub_actions is not None
        (forward, one), (backward, other) = (self._prepare(part, ctx) for part in action.sub_actions)
        if not ctx.schedule_ref._has_backward:  # an evaluation
            with one.joined():
                return forward()
        one.begin()
        other.begin()
        pending = self._backwards.submit(backward)
        try:
            forward()
        finally:
            try:
                pending.result()
            finally:
                one.end()
                other.end()

    def _prepare(self, action: _Action, ctx: _PipelineContext) -> tuple[Callable[[], None], Lane]:
        """Wait for what the part needs from other ranks; what is left to do is the result, and in which lane."""
        schedule: Any = ctx.schedule_ref
        stages = {stage.stage_index: stage for stage in schedule._stages}
        stage, number, micro_batch = stages[action.stage_index], action.stage_index, action.microbatch_index
        assert micro_batch is not None
        # Neighbouring stages on one rank, the turn of the V, hand tensors over themselves.
        before, behind = stages.get(number - 1), stages.get(number + 1)

        def forward() -> None:
            output = stage.forward_in_lane(micro_batch, save_output=False)
            schedule._maybe_compute_loss(stage, output, ctx.target_mbs, micro_batch)
            if behind is not None:
                behind.set_local_fwd_input(output, micro_batch)

        def backward() -> None:
            stage.backward_in_lane(micro_batch, loss, last)
            if before is not None:
                before.set_local_bwd_input(stage.get_local_bwd_output(micro_batch), micro_batch)

        if action.computation_type == FORWARD:
            if not stage.is_first and before is None:
                _wait(schedule.fwd_recv_ops.pop((number, micro_batch)))
            return forward, stage.lane
        if not stage.is_last and behind is None:
            _wait(schedule.bwd_recv_ops.pop((number, micro_batch)))
        loss = schedule._maybe_get_loss(stage, micro_batch)
        schedule.backward_counter[number] += 1
        last = schedule.backward_counter[number] == schedule._n_microbatches
        return backward, stage.lane


def _enter(device: torch.device) -> None:
    """The current device is a thread's own."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


def _wait(receives: list[Any]) -> None:
    for receive in receives:
        receive.wait()
