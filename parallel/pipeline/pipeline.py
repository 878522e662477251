"""Runs the micro-batches of a step through the parts of a model: through all of it on one rank, through a schedule
of `torch.distributed.pipelining` on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining.schedules import (
    OVERLAP_F_B,
    PipelineScheduleSingle,
    _PipelineSchedule,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from parallel.clock import Clock
from parallel.pipeline.lane import Lane
from parallel.pipeline.order import SCHEDULES, layout
from parallel.pipeline.overlap import overlap
from parallel.pipeline.split import Part, parts
from parallel.pipeline.stage import PartModel, Stage
from parallel.topology import Axis


def held_by(rank: int, ranks: int, counts: Sequence[int], schedule: str) -> list[tuple[int, Part]]:
    """Number and part of every stage that a rank of the pipeline holds.

    Args:
        counts: layers of each stage.
        schedule: V-shaped ones come back to the first rank, so that it holds the first and the last stage; the others
            go round.
    """
    every = parts(counts)
    return [(number, every[number]) for number in layout(schedule, ranks, len(every) // ranks)[rank]]


class Pipeline:
    """This rank's end of the pipeline.

    Args:
        model: runs its parts.
        held: the stages here, from :func:`held_by`.
        stages: how many there are on all ranks.
        axis: the pipeline's ranks.
        schedule: the name of one of `SCHEDULES`; of no account on one rank.
        micro_batches: of every training step.
        hidden: an empty tensor with the shape and dtype of the hidden states of one micro-batch.
        clock: gets the span ``forward_backward``, and what the stages do inside it.
    """

    def __init__(
        self,
        model: PartModel,
        held: Sequence[tuple[int, Part]],
        stages: int,
        axis: Axis,
        schedule: str,
        micro_batches: int,
        hidden: Tensor,
        clock: Clock,
    ) -> None:
        self.model, self.clock = model, clock
        self.micro_batches = micro_batches
        self._stages: list[Stage] = []
        self._schedule: _PipelineSchedule | None = None
        if axis.size == 1:
            (self._whole,) = (part for _, part in held)
            return
        # Streams of their own only where two stages run at once: else they would but wait for each other.
        streams = SCHEDULES[schedule].overlaps and hidden.device.type != "cpu"
        self._stages = [
            Stage(
                model,
                part,
                number,
                stages,
                hidden,
                axis.group,
                clock,
                Lane(torch.Stream(hidden.device) if streams else None),
            )
            for number, part in held
        ]
        kind = get_schedule_class(SCHEDULES[schedule].torch_name)
        single = issubclass(kind, PipelineScheduleSingle)
        made: Any = kind(
            self._stages[0] if single else self._stages,
            n_microbatches=micro_batches,
            loss_fn=lambda loss, _: loss,  # the last part computes it
            scale_grads=False,
        )
        if SCHEDULES[schedule].overlaps:
            overlap(made)
        self._schedule = made

    def take_turns(self) -> None:
        """Run what a schedule overlaps one after the other, in the thread that calls."""
        if isinstance(self._schedule, _PipelineScheduleRuntime):
            self._schedule._comp_type_to_function_map.pop(OVERLAP_F_B, None)

    @property
    def round(self) -> int:
        """Micro-batches that an evaluation has to be given at a time."""
        return self.micro_batches if self._schedule else 1

    def train(self, micro_batches: Sequence[Any], end_micro_batch: Callable[[], None]) -> None:
        """Forward and backward of every micro-batch; gradients add up.

        Args:
            end_micro_batch: called after each backward pass, on one rank. A schedule has no such moment.
        """
        self.clock.begin()
        with self.clock.span("forward_backward"):
            if self._schedule is None:
                for batch in micro_batches:
                    self.model.part(self._whole, None, batch).backward()
                    end_micro_batch()
            else:
                self._feed(micro_batches)
                self._schedule.step(target=self._targets(), return_outputs=False)
                self._feed(())

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any]) -> None:
        """Forward of ``round`` micro-batches; what the model meters is the result."""
        if self._schedule is None:
            for batch in micro_batches:
                self.model.part(self._whole, None, batch)
        else:
            self._feed(micro_batches)
            self._schedule.eval(target=self._targets(), return_outputs=False)
            self._feed(())

    def _feed(self, micro_batches: Sequence[Any]) -> None:
        assert len(micro_batches) in (0, self.micro_batches)
        for stage in self._stages:
            stage.micro_batches = micro_batches

    def _targets(self) -> Tensor:
        """torch wants one per micro-batch for the loss that our last part has computed already."""
        return torch.zeros(self.micro_batches)
