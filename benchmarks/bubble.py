"""Measure the bubble of every pipeline schedule on this machine, whatever it has: the stages sleep.

    python benchmarks/bubble.py --pp 4 --microbatches 8 16

Processes on this machine exchange small tensors by gloo, in torch's own schedules; what a stage computes is a pause of
a given length. So the figures show the schedules and the cost of running them, and no arithmetic. Every schedule gives
each rank the same work for a micro-batch: where a rank has two stages, a stage takes half as long. A pause does not
slow another one down, so that pairs of DualPipeV which run at once are shown at their best.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.pipelining import PipelineStage  # noqa: E402
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class  # noqa: E402

from backends.errors import UserError  # noqa: E402
from launch.arguments import Parser  # noqa: E402
from launch.errors import run  # noqa: E402
from launch.show import console, table  # noqa: E402
from parallel.pipeline.order import SCHEDULES, default_chunks, layout  # noqa: E402
from parallel.pipeline.overlap import overlap  # noqa: E402
from parallel.pipeline.timeline import Durations, Span, Timeline, simulate  # noqa: E402

WIDTH = 16  # of the tensors that travel: large enough to be sent, too small to take time
Case = tuple[str, int, bool]  # schedule, micro-batches, whether pairs run at once


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = Parser(prog="benchmarks/bubble.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--pp", type=int, default=4, metavar="N", help="processes (4)")
    add("--microbatches", type=int, nargs="+", default=[8, 16], metavar="N", help="micro-batches of a step (8 16)")
    add("--milliseconds", type=float, default=20.0, metavar="T", help="a rank's forward of a micro-batch (20)")
    add("--steps", type=int, default=3, metavar="N", help="timed steps of each schedule (3)")
    args = parser.parse_args(argv)
    return run(lambda: _bench(args), debug=False)


def _bench(args: argparse.Namespace) -> int:
    pause = args.milliseconds / 1000
    cases = [
        (schedule, micro_batches, together)
        for micro_batches in args.microbatches
        for schedule in SCHEDULES
        for together in ((False, True) if schedule == "dualpipev" else (False,))
    ]
    try:
        planned = [_planned(args.pp, pause, *case) for case in cases]
    except ValueError as error:
        raise UserError(f"bubble: {error}") from None
    if args.steps < 1 or not pause > 0:
        raise UserError("bubble: nothing to measure; give --steps and --milliseconds of more than 0")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure, (args.pp, folder, cases, pause, args.steps), nprocs=args.pp)
        measured = json.loads(Path(folder, "results.json").read_text())
    shown = table("schedule", "micro-batches", "bubble planned", "measured", "step planned", "measured", numbers=5)
    for (schedule, micro_batches, together), plan, (bubble, total) in zip(cases, planned, measured, strict=True):
        name = (
            f"{schedule}, {'pairs at once' if together else 'pairs in turn'}" if schedule == "dualpipev" else schedule
        )
        bubbles = (f"{plan.bubble:.3f}", f"{bubble:.3f}")
        shown.add_row(name, str(micro_batches), *bubbles, f"{plan.total:.3f} s", f"{total:.3f} s")
    console().print(shown)
    return 0


def _planned(pp: int, pause: float, schedule: str, micro_batches: int, together: bool) -> Timeline:
    chunks = default_chunks(schedule)
    one = pause / chunks
    return simulate(schedule, pp, micro_batches, chunks, Durations(one, one, one), together)


def _measure(rank: int, pp: int, folder: str, cases: list[Case], pause: float, steps: int) -> None:
    """What one process does; the first one writes each case's bubble and step time, of its median step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=pp)
    results = []
    for schedule, micro_batches, together in cases:
        timelines = _steps(rank, pp, schedule, micro_batches, together, pause, steps)
        middle = sorted(timelines, key=lambda timeline: timeline.total)[len(timelines) // 2]
        results.append((middle.bubble, middle.total))
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _steps(
    rank: int, pp: int, name: str, micro_batches: int, together: bool, pause: float, steps: int
) -> list[Timeline]:
    """The timelines of some steps, the same on every rank."""
    kind, held = get_schedule_class(SCHEDULES[name].torch_name), layout(name, pp, default_chunks(name))
    stages = [TracedStage(number, pp * len(held[0]), pause / len(held[0])) for number in held[rank]]
    single = issubclass(kind, PipelineScheduleSingle)
    schedule = kind(
        stages[0] if single else stages,  # type: ignore[arg-type]
        micro_batches,
        loss_fn=lambda output, target: (output - target).sum(),
        scale_grads=False,
    )
    if together:
        overlap(schedule)  # type: ignore[arg-type]
    x = torch.zeros(micro_batches, WIDTH)
    timelines = []
    for step in range(steps + 1):
        for stage in stages:
            stage.spans = []
        dist.barrier()
        began = time.perf_counter()
        schedule.step(*([x] if rank == 0 else []), target=x, return_outputs=False)
        spans = [span for stage in stages for span in stage.spans]
        mine = [span._replace(start=span.start - began, end=span.end - began) for span in spans]
        ranks: list[Any] = [None] * pp
        dist.all_gather_object(ranks, mine)
        if step > 0:  # the first opens connections
            timelines.append(Timeline(name, held, ranks))
    return timelines


class _Pause(torch.autograd.Function):
    """The identity, which takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_pause = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_pause)
        return grad.clone(), None, None


class _Chunk(nn.Module):
    """A pause in the forward, and one each for the gradients of input and weight, which torch can split."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause
        self.weight = nn.Parameter(torch.zeros(WIDTH))
        self.shift = nn.Parameter(torch.zeros(WIDTH))  # has the first stage compute input gradients, as layers do

    def forward(self, x: Tensor) -> Tensor:
        return _Pause.apply(x + self.shift, self.pause, self.pause) + _Pause.apply(self.weight, 0.0, self.pause)


class TracedStage(PipelineStage):
    """A stage of pauses that notes when it did what."""

    def __init__(self, number: int, total: int, pause: float) -> None:
        outside = torch.empty(1, WIDTH, device="meta")
        inside = outside.clone().requires_grad_()
        given = outside if number == 0 else inside
        super().__init__(_Chunk(pause), number, total, torch.device("cpu"), given, inside)
        self.spans: list[Span] = []

    def _note(self, kind: str, micro_batch: int, began: float) -> None:
        self.spans.append(Span(kind, self.stage_index, micro_batch, began, time.perf_counter()))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **how: Any) -> Any:
        began = time.perf_counter()
        output = super().forward_one_chunk(fwd_chunk_id, *args, **how)
        self._note("F", fwd_chunk_id, began)
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, full_backward: bool = True, **how: Any) -> None:
        began = time.perf_counter()
        super().backward_one_chunk(bwd_chunk_id, *args, full_backward=full_backward, **how)
        self._note("B" if full_backward else "I", bwd_chunk_id, began)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **how: Any) -> None:
        began = time.perf_counter()
        super().backward_weight_one_chunk(bwd_chunk_id, *args, **how)
        self._note("W", bwd_chunk_id, began)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
