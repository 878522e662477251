"""On two ranks: a DualPipeV step whose pairs run one after the other, as torch does it, and at once.

Reports what tests/distributed/test_overlap.py compares.
"""

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import OVERLAP_F_B, ScheduleDualPipeV

from parallel.clock import Clock
from parallel.pipeline.lane import Lane
from parallel.pipeline.overlap import overlap
from parallel.pipeline.pipeline import held_by
from parallel.pipeline.split import Part
from parallel.pipeline.stage import Stage
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


class Model:
    """As many parts as there are stages; the last one's gives the loss."""

    def __init__(self, chunks: dict[Part, Chunk]) -> None:
        self.chunks = chunks

    def part(self, part: Part, hidden: Tensor | None, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = micro_batch
        y = self.chunks[part](x if hidden is None else hidden)
        return (y - target).square().sum() if part.last else y


def run(overlapped: bool) -> dict[str, Any]:
    """Losses and gradients of a few steps, an evaluation, and how often forward and backward met."""
    rank, meeting = dist.get_rank(), Meeting()
    held = held_by(rank, 2, [1] * 4, "dualpipev")
    model = Model({part: Chunk(number, meeting) for number, part in held})
    assert dist.group.WORLD is not None
    like = torch.empty(ROWS, WIDTH)
    stages = [
        Stage(model, part, number, 4, like, dist.group.WORLD, Clock(like.device), Lane()) for number, part in held
    ]
    schedule = ScheduleDualPipeV(stages, MICRO_BATCHES, loss_fn=lambda loss, _: loss, scale_grads=False)
    if overlapped:
        overlap(schedule)
        pair = schedule._comp_type_to_function_map[OVERLAP_F_B]

        def watched(action: Any, ctx: Any) -> None:
            meeting.wanted = schedule._has_backward
            pair(action, ctx)
            meeting.wanted = False

        schedule._comp_type_to_function_map[OVERLAP_F_B] = watched
    torch.manual_seed(7)
    losses: list[Tensor] = []
    for step in range(STEPS + 1):
        x, target = torch.randn(2, MICRO_BATCHES, ROWS, WIDTH)
        for stage in stages:
            stage.micro_batches = list(zip(x, target, strict=True))
        once: list[Tensor] = []
        act = schedule.step if step < STEPS else schedule.eval
        act(target=torch.zeros(MICRO_BATCHES), losses=once, return_outputs=False)
        losses += once
    return {
        "losses": [float(loss) for loss in losses],
        "gradients": [parameter.grad.tolist() for chunk in model.chunks.values() for parameter in chunk.parameters()],
        "pairs": sum(action.computation_type == OVERLAP_F_B for action in schedule.pipeline_order[rank]),
        "met": meeting.held,
    }


def main() -> None:
    dist.init_process_group("gloo")
    report({"plain": run(False), "overlapped": run(True)})


if __name__ == "__main__":
    main()
