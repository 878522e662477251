"""On two ranks: a DualPipeV step whose pairs run one after the other, as torch does it, and at once.

Reports what tests/distributed/test_overlap.py compares.
"""

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import OVERLAP_F_B, ScheduleDualPipeV

from parallel.pipeline.order import layout
from parallel.pipeline.overlap import overlap
from tests.distributed.ranks import report

WIDTH, ROWS, MICRO_BATCHES, STEPS = 8, 3, 6, 2


class Meeting:
    """In a pair, forward and backward wait for each other: alone, either breaks the barrier."""

    def __init__(self) -> None:
        self.wanted, self.held = False, 0
        self._barrier = threading.Barrier(2, timeout=60)

    def attend(self) -> None:
        if self.wanted and self._barrier.wait() == 0:
            self.held += 1


class _Meet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, meeting: Meeting) -> Tensor:
        ctx.meeting = meeting
        meeting.attend()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.meeting.attend()
        return grad.clone(), None


class Chunk(nn.Module):
    """A layer whose gradients depend on every bit of its input."""

    def __init__(self, number: int, meeting: Meeting) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.meeting = meeting

    def forward(self, x: Tensor) -> Tensor:
        return _Meet.apply(self.layers(x), self.meeting)


class Stage(PipelineStage):
    """torch 2.13's V-shaped schedules hand gradients on in an evaluation too, if a stage lets them."""

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


def run(overlapped: bool) -> dict[str, Any]:
    """Losses and gradients of a few steps, an evaluation, and how often forward and backward met."""
    rank, meeting = dist.get_rank(), Meeting()
    example = torch.empty(ROWS, WIDTH, device="meta", requires_grad=True)
    chunks = [Chunk(number, meeting) for number in layout("dualpipev", 2, 2)[rank]]
    stages = [
        Stage(chunk, number, 4, torch.device("cpu"), example.detach() if number == 0 else example, example)
        for chunk, number in zip(chunks, layout("dualpipev", 2, 2)[rank], strict=True)
    ]
    schedule = ScheduleDualPipeV(
        stages, MICRO_BATCHES, loss_fn=lambda y, target: (y - target).square().sum(), scale_grads=False
    )
    if overlapped:
        overlap(schedule, keep_outputs=True)
        pair = schedule._comp_type_to_function_map[OVERLAP_F_B]

        def watched(action: Any, ctx: Any) -> None:
            meeting.wanted = schedule._has_backward
            pair(action, ctx)
            meeting.wanted = False

        schedule._comp_type_to_function_map[OVERLAP_F_B] = watched
    torch.manual_seed(7)
    losses: list[Tensor] = []
    outputs = []
    for step in range(STEPS + 1):
        x, target = torch.randn(2, MICRO_BATCHES * ROWS, WIDTH)
        once: list[Tensor] = []
        act = schedule.step if step < STEPS else schedule.eval
        outputs.append(act(*([x] if rank == 0 else []), target=target, losses=once))
        losses += once
    return {
        "losses": [float(loss) for loss in losses],
        "outputs": [output.tolist() for output in outputs if output is not None],
        "gradients": [parameter.grad.tolist() for chunk in chunks for parameter in chunk.parameters()],
        "pairs": sum(action.computation_type == OVERLAP_F_B for action in schedule.pipeline_order[rank]),
        "met": meeting.held,
    }


def main() -> None:

    dist.init_process_group("gloo")
    report({"plain": run(False), "overlapped": run(True)})


if __name__ == "__main__":
    main()
