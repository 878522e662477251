"""One stage of a pipeline: torch's, with our micro-batches, and with weight gradients that can wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from backends.weight_gradients import deferred
from parallel.clock import Clock
from parallel.pipeline.lane import Lane
from parallel.pipeline.split import Part


class PartModel(Protocol):
    """What a pipeline asks of a model: to run one part of itself on one micro-batch."""

    def part(self, part: Part, hidden: Tensor | None, micro_batch: Any) -> Tensor:
        """Hidden states of the part's last layer, or the loss where the part is the last.

        ``hidden`` is what the part before gave; None for the first.
        """


class _Chunk(nn.Module):
    """The call that torch makes: no input on the first stage, hidden states on the others. Registers no parameter."""

    def __init__(self, model: PartModel, part: Part) -> None:
        super().__init__()
        self.run: Callable[..., Tensor] = lambda hidden, batch: model.part(part, hidden, batch)

    def forward(self, *hidden: Tensor, micro_batch: Any) -> Tensor:
        return self.run(hidden[0] if hidden else None, micro_batch)


class Stage(PipelineStage):
    """Part ``number`` of ``total``, on this rank.

    Args:
        hidden: an empty tensor with the shape and dtype of what stages exchange. Told, because torch would find out
            with a real forward pass that the experts' counters see.
        clock: gets the seconds of every action.
        lane: where the passes run.
    """

    def __init__(
        self,
        model: PartModel,
        part: Part,
        number: int,
        total: int,
        hidden: Tensor,
        group: dist.ProcessGroup,
        clock: Clock,
        lane: Lane,
    ) -> None:
        loss = torch.empty((), dtype=torch.float32, device="meta")
        super().__init__(
            _Chunk(model, part),
            number,
            total,
            hidden.device,
            input_args=() if part.first else hidden.to("meta").requires_grad_(),
            output_args=loss if part.last else hidden.to("meta").requires_grad_(),
            group=group,
        )
        self.clock, self.lane = clock, lane
        self.micro_batches: Sequence[Any] = ()

    def forward_one_chunk(self, fwd_chunk_id, args, kwargs=None, save_forward_output=True):  # type: ignore[no-untyped-def]
        with self.lane.joined():
            return self.forward_in_lane(fwd_chunk_id, save_forward_output)

    def forward_in_lane(self, micro_batch: int, save_output: bool) -> Any:
        """The forward of one micro-batch, in a lane that has begun."""
        with self.lane.inside(), self.clock.action("F", self.stage_index, micro_batch):
            batch = {"micro_batch": self.micro_batches[micro_batch]}
            return super().forward_one_chunk(micro_batch, (), batch, save_output)

    def backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):  # type: ignore[no-untyped-def]
        """A split backward is a whole one whose weight gradients are left for later.

        torch's own split walks the graph twice and recomputes a checkpointed layer at each walk.
        """
        if not self.has_backward:
            return
        if full_backward:
            with self.lane.joined():
                self.backward_in_lane(bwd_chunk_id, loss, last_backward)
            return
        with self.lane.joined(), self.clock.action("I", self.stage_index, bwd_chunk_id), deferred() as store:
            super().backward_one_chunk(bwd_chunk_id, loss, True, last_backward)
        self.dw_runner[bwd_chunk_id] = store.run

    def backward_in_lane(self, micro_batch: int, loss: Any, last: bool) -> None:
        """The whole backward of one micro-batch, in a lane that has begun."""
        with self.lane.inside(), self.clock.action("B", self.stage_index, micro_batch):
            super().backward_one_chunk(micro_batch, loss, True, last)

    def backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False):  # type: ignore[no-untyped-def]
        if not self.has_backward:
            return
        with self.lane.joined(), self.clock.action("W", self.stage_index, bwd_chunk_id):
            self.dw_runner.pop(bwd_chunk_id)()

    # Evaluation runs the training schedule without its backward; torch's V-shaped ones would pass gradients on still.

    def get_local_bwd_output(self, mb_index):  # type: ignore[no-untyped-def]
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs, mb_index):  # type: ignore[no-untyped-def]
        if self.has_backward:
            for gradient in next_stage_bwd_outputs:
                self.lane.take(gradient)
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def set_local_fwd_input(self, prev_stage_outputs, mb_index):  # type: ignore[no-untyped-def]
        self.lane.take(prev_stage_outputs)  # hidden states: one tensor
        super().set_local_fwd_input(prev_stage_outputs, mb_index)
