"""`moebius verify layouts`: every layout of N processes trains the model that one process trains, or which does not."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import ConfigParser, count
from launch.errors import run
from launch.verify.output import add_outputs, finish

if TYPE_CHECKING:
    from trainer.verify.difference import Difference
    from trainer.verify.layouts import Found, Layout

# What would only take time, or need more than this machine; in fp32 only the order of sums differs. Keys that are given
# count more.
_SHORT = (
    "train.precision=fp32 train.eval_every=0 train.eval_sequences=8 train.bigram_baseline=false train.log_every=1 "
    "checkpoint.every=0 metrics.tensorboard=false metrics.csv=false metrics.wandb=false metrics.peak_tflops=1"
).split()
_TRACED = 3  # layouts that differ of which the first difference is looked for: they often differ for one reason
_GRACE = 5.0  # seconds for the other ranks to say what they saw when one has failed


def main(argv: list[str]) -> int:
    """Train a config for a few steps under every layout, and report the matrix."""
    parser = ConfigParser(
        "moebius verify layouts",
        "Train a config for a few steps under every layout of N processes of this machine (pipeline, schedules, "
        "experts, replicas, recomputation), and compare each with one process. It starts the processes itself.",
    )
    add = parser.add_argument
    add("--world", metavar="N", type=count, required=True, help="processes of every layout")
    add("--steps", metavar="N", type=count, default=20, help="steps that each trains (20)")
    add("--bound", metavar="X", type=float, default=1e-5, help="largest relative difference that passes (1e-5)")
    add("--limit", metavar="SECONDS", type=float, default=900.0, help="time that each may take (900)")
    add_outputs(parser)
    args = parser.parse(argv)
    return run(lambda: _layouts(args), debug=False)


def _layouts(args: argparse.Namespace) -> int:
    from backends.errors import UserError

    if "RANK" in os.environ:
        raise UserError("verify layouts: starts its processes itself; start it without a launcher")
    from trainer.config.load import load_config
    from trainer.verify.layouts import REFERENCE, Refused, differs, every_layout, fitted, report

    overrides = [*_SHORT, *args.overrides, f"train.steps={args.steps}"]
    config = load_config(args.config, overrides)
    reference = fitted(REFERENCE, config, args.config)
    if isinstance(reference, Refused):
        raise UserError(f"{args.config}: {reference.reason}")
    outcomes: dict[Layout, Found | None] = {}  # in the order of the table, which is not that of the launches
    runs = {}
    for layout in every_layout(args.world):
        wanted = fitted(layout, config, args.config)
        outcomes[layout] = wanted if isinstance(wanted, Refused) else None
        if not isinstance(wanted, Refused):
            runs[layout] = [*overrides, *wanted]
    if not any(layout.world == args.world for layout in runs):
        reason = next(found.reason for found in outcomes.values() if isinstance(found, Refused))
        raise UserError(f"{args.config}: --world {args.world}: no layout applies: {reason}")
    from launch.processes import ended_by_signals

    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="moebius-layouts-") as folder:
        turns = _Turns(args, Path(folder), threads=max(1, (os.cpu_count() or 1) // args.world))
        turns.train({REFERENCE: [*overrides, *reference]})
        for world in sorted({layout.world for layout in runs}):
            outcomes |= turns.train({layout: runs[layout] for layout in runs if layout.world == world})
        found = {layout: outcome for layout, outcome in outcomes.items() if outcome is not None}
        wrong = [layout for layout, outcome in found.items() if differs(outcome, args.bound)][:_TRACED]
        firsts = {layout: turns.first_difference([*overrides, *reference], layout, runs[layout]) for layout in wrong}
    about = {
        "config": " ".join([args.config, *args.overrides]),
        "processes": str(args.world),
        "steps": str(args.steps),
        "overrides for all": " ".join(_SHORT),
    }
    return finish(report(found, firsts, args.bound, about), args)


class _Turns:
    """Launches. The first one trains the reference, which all others are compared with."""

    def __init__(self, args: argparse.Namespace, folder: Path, threads: int) -> None:
        self._args, self._folder, self._threads = args, folder, threads
        self._reference: Path | None = None

    def train(self, runs: dict[Layout, list[str]]) -> dict[Layout, Found]:
        """What became of layouts of the same number of processes, one launch for all that end as they should.

        Raises:
            UserError: one cannot run here, or the reference does not train to its end.
        """
        from backends.errors import UserError

        found: dict[Layout, Found] = {}
        while len(found) < len(runs):
            left = {layout: wanted for layout, wanted in runs.items() if layout not in found}
            problem = self._launch(left, found)
            failed = next((layout for layout in left if layout not in found), None)
            if failed is not None:
                if self._reference is None:
                    raise UserError(f"{self._args.config}: one process does not train it: {problem}")
                found[failed] = problem
        return found

    def _launch(self, runs: dict[Layout, list[str]], found: dict[Layout, Found]) -> str:
        """Add what the layouts gave that ended to ``found``; returns why the next one did not, if there is one."""
        from trainer.verify.turns import Plan, count_ended

        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            named = [(str(self._folder / layout.name), wanted) for layout, wanted in runs.items()]
            plan, layouts = Plan(self._args.config, named, f"{folder}/ended"), list(runs)
            Path(folder, "plan.json").write_text(json.dumps(asdict(plan)), encoding="utf-8")
            compared = 0

            def compare() -> int:
                nonlocal compared
                while compared < count_ended(plan):
                    layout = layouts[compared]
                    found[layout] = self._compare(self._folder / layout.name)
                    compared += 1
                    if sys.stderr.isatty():
                        print(f"trained: {layout.name}", file=sys.stderr, flush=True)
                return compared

            arguments = ("trainer.verify.turns", f"{folder}/plan.json")
            problem = self._ranks(layouts[0].world, *arguments, folder=Path(folder), progress=compare)
            return problem if compare() < len(layouts) else ""

    def _ranks(self, world: int, *command: str, folder: Path, progress: Callable[[], int] = lambda: 0) -> str:
        """Run a module on so many ranks to its end; returns what went wrong, in one line."""
        from launch import processes

        logs = [folder / f"{rank}.log" for rank in range(world)]
        shared = {"OMP_NUM_THREADS": str(self._threads)}
        started = (
            processes.started(*command, log=log, where=processes.environment(**shared, **place))
            for log, place in zip(logs, processes.places(world), strict=True)
        )
        codes = processes.exit_codes(started, self._args.limit, _GRACE, progress)
        if set(codes) <= {0, processes.TIMED_OUT}:
            return f"did not end within {self._args.limit:g} seconds"
        texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
        rank = processes.blamed(codes, texts)
        last = [line for line in texts[rank].splitlines() if line.strip()][-1:]
        return " ".join([f"rank {rank} ended with exit code {codes[rank]}:", *last])

    def first_difference(self, reference: list[str], layout: Layout, wanted: list[str]) -> str:
        """Where a layout parts from one process, by traces of a few steps of both."""
        from trainer.verify.compare import compare
        from trainer.verify.layouts import REFERENCE

        traces = {name: self._folder / f"trace-{name}" for name in (REFERENCE.name, layout.name)}
        for (name, trace), world, overrides in zip(traces.items(), (1, layout.world), (reference, wanted), strict=True):
            if not trace.exists():
                logs = self._folder / f"logs-{name}"
                logs.mkdir()
                command = ("launch.verify.record", "--config", self._args.config, "--out", str(trace), *overrides)
                problem = self._ranks(world, *command, folder=logs)
                if not trace.exists():
                    return f"{name} left no trace: {problem}"
        first = compare(*traces.values()).first
        return str(first) if first else "none in the first steps; compare longer traces of `moebius verify record`"

    def _compare(self, run: Path) -> Difference:
        """With the reference, which is the first one. A run that has been compared need not stay on the disk."""
        from trainer.verify.difference import difference

        self._reference = self._reference or run
        found = difference(self._reference, run, self._args.steps)
        if run != self._reference:
            shutil.rmtree(run)
        return found
