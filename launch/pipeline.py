"""`moebius pipeline`: what a pipeline's ranks do and when, as a schedule plans it or as a run has done it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from launch.arguments import Parser
from launch.errors import run
from parallel.pipeline.order import SCHEDULES

if TYPE_CHECKING:
    from parallel.pipeline.timeline import Timeline

_PLAN = ("pp", "microbatches", "chunks", "forward", "input", "weight", "communication")


def main(argv: list[str]) -> int:
    """Draw a timeline in the terminal, and as a picture; say how much of the ranks' time is idle."""
    parser = Parser(prog="moebius pipeline", description="Draw the timeline of a pipeline schedule and its bubble.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--schedule", choices=SCHEDULES, help="simulate a step of this schedule")
    what.add_argument("--trace", metavar="RUN_DIR", help="show the step that a run has traced, and simulate it")
    add = parser.add_argument
    add("--pp", metavar="N", type=int, help="ranks of the pipeline")
    add("--microbatches", metavar="N", type=int, help="micro-batches of a step")
    add("--chunks", metavar="N", type=int, help="stages of a rank (default: 1 or 2, as the schedule has)")
    add("--forward", metavar="T", type=float, help="time of a stage's forward, in any unit (default: 1)")
    add("--input", metavar="T", type=float, help="time of its input gradients (default: 1)")
    add("--weight", metavar="T", type=float, help="time of its weight gradients (default: 1)")
    add("--communication", metavar="T", type=float, help="time from one rank to the next (default: 0)")
    add("--no-overlap", action="store_true", help="let no forward and backward of dualpipev run at once")
    add("--out", metavar="FILE", help="picture to write: .svg, .png or .pdf")
    args = parser.parse_args(argv)
    given = [f"--{name}" for name in _PLAN if getattr(args, name) is not None] + ["--no-overlap"] * args.no_overlap
    if args.trace is not None and given:
        parser.error(f"argument {given[0]}: not allowed with argument --trace, which tells it")
    if args.no_overlap and args.schedule != "dualpipev":
        parser.error(f"argument --no-overlap: {args.schedule} overlaps nothing; only dualpipev does")
    missing = [f"--{name}" for name in _PLAN[:2] if getattr(args, name) is None]
    if args.schedule is not None and missing:
        parser.error(f"argument --schedule: needs {' and '.join(missing)}, too")
    return run(lambda: _show_trace(args) if args.trace is not None else _show_schedule(args), debug=False)


def _show_schedule(args: argparse.Namespace) -> int:
    from backends.errors import UserError
    from parallel.pipeline.order import default_chunks
    from parallel.pipeline.timeline import Durations, simulate

    chunks = default_chunks(args.schedule) if args.chunks is None else args.chunks
    times = {name: getattr(args, name) for name in _PLAN[3:] if getattr(args, name) is not None}
    try:
        made = simulate(args.schedule, args.pp, args.microbatches, chunks, Durations(**times), not args.no_overlap)
    except ValueError as error:
        raise UserError(f"pipeline: {error}") from None
    if not made.total:
        raise UserError("pipeline: nothing takes any time; give one of --forward, --input and --weight more than 0")
    about = f"{args.schedule}, {_count(args.pp, 'rank')}, {_count(args.microbatches, 'micro-batch')}"
    return _show(about, {"in theory": made}, args.out)


def _show_trace(args: argparse.Namespace) -> int:
    from parallel.pipeline import trace
    from parallel.pipeline.timeline import simulate

    header, measured = trace.read(args.trace)
    plan = (header.schedule, header.pp, header.micro_batches, header.chunks)
    planned = simulate(*plan, trace.durations(measured), measured.overlaps)
    about = f"{header.schedule}, {_count(header.pp, 'rank')}, {_count(header.micro_batches, 'micro-batch')}"
    return _show(f"{about}, step {header.step} of {args.trace}", {"measured": measured, "in theory": planned}, args.out)


def _show(about: str, timelines: dict[str, Timeline], out: str | None) -> int:
    """Print the first timeline and the bubbles of all; draw all where a picture is wanted."""
    from launch.show import console, table
    from launch.timeline import legend, rows

    seconds = "measured" in timelines
    screen, first = console(), next(iter(timelines.values()))
    screen.print(about, style="bold")
    screen.print()
    for line in [*rows(first, screen.width), "", legend(first), ""]:
        screen.print(line)
    shown = table("", "bubble", "step", numbers=2)
    for name, timeline in timelines.items():
        shown.add_row(
            name, f"{timeline.bubble:.1%}", f"{1000 * timeline.total:.1f} ms" if seconds else f"{timeline.total:g}"
        )
    screen.print(shown)
    if seconds:
        screen.print(
            "\nin theory: every action takes the mean time of its kind, and nothing travels or waits otherwise"
        )
    if out is not None:
        from trainer.metrics.pipeline import draw

        titled = [(f"{about}: bubble {timeline.bubble:.1%} {name}", timeline) for name, timeline in timelines.items()]
        draw(titled, out, unit="s" if seconds else "")
        screen.print(f"\n{out}")
    return 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('h') else 's'}"
