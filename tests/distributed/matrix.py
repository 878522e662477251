"""Every schedule on every layout against one process: `python -m tests.distributed.matrix` prints the table.

With clipping, auxiliary loss, z-loss, multi-token prediction and expert bias, with and without recomputation.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from parallel.pipeline.order import SCHEDULES
from tests.distributed.ranks import run_ranks
from tests.small import write_inputs
from trainer.verify.difference import Difference, difference

STEPS = 20
BOUND = 1e-5
SEQUENCES = 16
# Eight layers for the eight stages of four ranks, five of them dense: some stages have no experts. Few tokens and the
# seed keep every choice of an expert 1e-5 away from a tie at least, which rounding would break in one run only.
MODEL = (
    f"model.num_layers=8 model.dense_layers=5 data.sequence_length=16 train.global_batch_tokens={16 * SEQUENCES} seed=8"
)


@dataclass(frozen=True)
class Case:
    """One layout under one schedule."""

    schedule: str = "1f1b"
    pp: int = 1
    ep: int = 1
    edp: int = 1
    recompute: bool = False
    more: str = ""  # further overrides

    @property
    def world(self) -> int:
        return self.pp * self.ep * self.edp

    @property
    def name(self) -> str:
        marks = ("recompute",) if self.recompute else ()
        schedule = (self.schedule,) if self.pp > 1 else ()
        return "-".join([*schedule, f"pp{self.pp}", f"ep{self.ep}", f"edp{self.edp}", *marks, *self.more.split()])

    def overrides(self, steps: int) -> str:
        """As much as two sequences in a micro-batch, as long as there are enough micro-batches for DualPipeV."""
        micro = 2 if SEQUENCES // (self.ep * self.edp) // 2 >= 2 * self.pp else 1
        recompute = "layer" if self.recompute else "none"
        return (
            f"{MODEL} train.steps={steps} train.micro_batch_size={micro} train.activation_checkpointing={recompute} "
            f"parallel.pipeline={self.pp} parallel.schedule={self.schedule} parallel.expert={self.ep} {self.more}"
        )


def every_case(processes: int) -> list[Case]:
    """All of them on up to so many processes; on one there is only recomputation to tell from the plain run."""
    found = []
    for recompute, pp, ep, edp in product((False, True), (1, 2, 4), (1, 2, 4), (1, 2)):
        for schedule in SCHEDULES if pp > 1 else ("1f1b",):
            case = Case(schedule, pp, ep, edp, recompute)
            if case.world <= processes and case != Case():
                found.append(case)
    return found


def train(folder: Path, cases: Sequence[Case], steps: int) -> None:
    """Train each case into the folder of its name; one launch for each number of ranks."""
    if not (folder / "small.yaml").exists():
        write_inputs(folder)
    for world in sorted({case.world for case in cases}):
        lines = [f"run_dir={folder}/{case.name} {case.overrides(steps)}" for case in cases if case.world == world]
        for outcome in run_ranks(
            world, "tests.distributed.train_many", f"{folder}/small.yaml", *lines, timeout=60 + 120 * len(lines)
        ):
            assert outcome == ["done"] * len(lines), outcome


def compare(folder: Path, cases: Sequence[Case], steps: int, reference: Case) -> dict[Case, Difference]:
    """The trained cases against one process."""
    return {case: difference(folder / reference.name, folder / case.name, steps) for case in cases}


def main() -> int:
    """Print the table as Markdown; 1 if a case is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=8, help="the most that one layout may take")
    arguments = parser.parse_args()
    cases, reference = every_case(arguments.processes), Case()
    print("| schedule | pp | ep | edp | recompute | loss | norm | weights | moments | load, bias |")
    print("| --- " * 10 + "|")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), [reference], STEPS)
        for world in sorted({case.world for case in cases}):
            some = [case for case in cases if case.world == world]
            train(Path(folder), some, STEPS)
            for case, found in compare(Path(folder), some, STEPS, reference).items():
                good &= found.within(BOUND)
                equal = "equal" if found.load_equal and found.bias_equal else "DIFFER"
                figures = " | ".join(f"{x:.1e}" for x in (found.loss, found.grad_norm, found.weights, found.moments))
                layout = f"{case.schedule if case.pp > 1 else '–'} | {case.pp} | {case.ep} | {case.edp}"
                print(f"| {layout} | {'yes' if case.recompute else 'no'} | {figures} | {equal} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
