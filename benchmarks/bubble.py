"""Measure the bubble of every pipeline schedule on this machine, whatever it has: the stages sleep.

    python benchmarks/bubble.py --pp 4 --microbatches 8 16

Processes on this machine exchange small tensors by gloo, in the pipeline that trains; what a stage computes is a pause
of a given length. So the figures show the schedules and the cost of running them, and no arithmetic. Every schedule
gives each rank the same work for a micro-batch: where a rank has two stages, a stage takes half as long. A pause does
not slow another one down, so that pairs of DualPipeV which run at once are shown at their best.
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

from backends.errors import UserError  # noqa: E402
from backends.weight_gradients import accumulate, deliver  # noqa: E402
from launch.arguments import Parser  # noqa: E402
from launch.errors import run  # noqa: E402
from launch.show import console, table  # noqa: E402
from parallel.clock import Clock  # noqa: E402
from parallel.pipeline.order import SCHEDULES, default_chunks, layout  # noqa: E402
from parallel.pipeline.pipeline import Pipeline, held_by  # noqa: E402
from parallel.pipeline.split import Part  # noqa: E402
from parallel.pipeline.timeline import Durations, Timeline, simulate  # noqa: E402
from parallel.topology import Axis  # noqa: E402

Case = tuple[str, int, bool]  # schedule, micro-batches, whether pairs run at once


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = Parser(prog="benchmarks/bubble.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--pp", type=int, default=4, metavar="N", help="processes (4)")
    add("--microbatches", type=int, nargs="+", default=[8, 16], metavar="N", help="micro-batches of a step (8 16)")
    add("--milliseconds", type=float, default=20.0, metavar="T", help="a rank's forward of a micro-batch (20)")
    add("--steps", type=int, default=5, metavar="N", help="steps of each schedule, the fastest of which counts (5)")
    args = parser.parse_args(argv)
    return run(lambda: _bench(args), debug=False)


def _bench(args: argparse.Namespace) -> int:
    pause = args.milliseconds / 1000
    cases = [
        (schedule, micro_batches, together)
        for micro_batches in args.microbatches
        for schedule in SCHEDULES
        for together in ((False, True) if SCHEDULES[schedule].overlaps else (False,))
    ]
    try:
        planned = [_planned(args.pp, pause, *case) for case in cases]
    except ValueError as error:
        raise UserError(f"bubble: {error}") from None
    if args.pp < 2:
        raise UserError(f"bubble: {args.pp} process has no pipeline; give --pp of at least 2")
    if args.steps < 1 or not pause > 0:
        raise UserError("bubble: nothing to measure; give --steps and --milliseconds of more than 0")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure, (args.pp, folder, cases, pause, args.steps), nprocs=args.pp)
        measured = json.loads(Path(folder, "results.json").read_text())
    shown = table("schedule", "micro-batches", "bubble planned", "measured", "step planned", "measured", numbers=5)
    for (schedule, micro_batches, together), plan, (bubble, total) in zip(cases, planned, measured, strict=True):
        pairs = f", pairs {'at once' if together else 'in turn'}" if SCHEDULES[schedule].overlaps else ""
        bubbles = (f"{plan.bubble:.3f}", f"{bubble:.3f}")
        shown.add_row(schedule + pairs, str(micro_batches), *bubbles, f"{plan.total:.3f} s", f"{total:.3f} s")
    console().print(shown)
    return 0


def _planned(pp: int, pause: float, schedule: str, micro_batches: int, together: bool) -> Timeline:
    chunks = default_chunks(schedule)
    one = pause / chunks
    return simulate(schedule, pp, micro_batches, chunks, Durations(one, one, one), together)


def _measure(rank: int, pp: int, folder: str, cases: list[Case], pause: float, steps: int) -> None:
    """What one process does; the first one writes each case's bubble and step time, of its fastest step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=pp)
    results = []
    for schedule, micro_batches, together in cases:
        timelines = _steps(rank, pp, schedule, micro_batches, together, pause, steps)
        best = min(timelines, key=lambda timeline: timeline.total)  # what else the machine does only adds
        results.append((best.bubble, best.total))
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _steps(
    rank: int, pp: int, schedule: str, micro_batches: int, together: bool, pause: float, steps: int
) -> list[Timeline]:
    """The timelines of some steps, the same on every rank."""
    chunks, clock = default_chunks(schedule), Clock(torch.device("cpu"))
    axis = Axis(dist.group.WORLD, rank, pp)
    held = held_by(rank, pp, [1] * (pp * chunks), schedule)
    hidden = torch.empty(16)  # large enough to be sent, too small to take time
    pipeline = Pipeline(_Pauses(pause / chunks), held, pp * chunks, axis, schedule, micro_batches, hidden, clock)
    if SCHEDULES[schedule].overlaps and not together:
        pipeline._schedule._comp_type_to_function_map.clear()  # back to torch's own way with pairs
    timelines = []
    for step in range(steps + 1):
        dist.barrier()
        clock.take()
        pipeline.train([None] * micro_batches, lambda: None)
        ranks: list[Any] = [None] * pp
        dist.all_gather_object(ranks, clock.take()[1])
        if step > 0:  # the first opens connections
            timelines.append(Timeline(schedule, layout(schedule, pp, chunks), ranks))
    return timelines


class _Pauses(nn.Module):
    """A model that takes ``pause`` seconds for each stage's forward, input gradients and weight gradients."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause
        self.weight = nn.Parameter(torch.zeros(16))

    def part(self, part: Part, hidden: Tensor | None, micro_batch: None) -> Tensor:
        """Hidden states (16,), or the loss."""
        x = torch.zeros(16, requires_grad=True) if hidden is None else hidden
        y = _Pause.apply(x, self.weight, self.pause)
        return y.sum() if part.last else y


class _Pause(torch.autograd.Function):
    """The identity, which takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pause: float) -> Tensor:
        ctx.weight, ctx.pause = weight, pause
        time.sleep(pause)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        pause = ctx.pause

        def write(out: Tensor, beta: int) -> None:
            time.sleep(pause)
            accumulate(out, torch.zeros_like(out), beta)

        time.sleep(pause)
        return grad.clone(), deliver(ctx.weight, write), None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
