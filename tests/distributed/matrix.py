"""Some schedules on some layouts against one process, with processes that start fast; `moebius verify layouts` has all.

With clipping, auxiliary loss, z-loss, multi-token prediction and expert bias, with and without recomputation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.ranks import run_ranks
from tests.small import write_inputs
from trainer.verify.difference import Difference, difference
from trainer.verify.layouts import Layout

BOUND = 1e-5
SEQUENCES = 16
# Eight layers for the eight stages of four ranks, five of them dense: some stages have no experts. Few tokens and the
# seed keep every choice of an expert 1e-5 away from a tie at least, which rounding would break in one run only.
MODEL = (
    f"model.num_layers=8 model.dense_layers=5 data.sequence_length=16 train.global_batch_tokens={16 * SEQUENCES} seed=8"
)


@dataclass(frozen=True)
class Case(Layout):
    """One layout under one schedule."""

    more: str = ""  # further overrides

    @property
    def folder(self) -> str:
        return "-".join([self.name, *self.more.split()])

    def line(self, steps: int) -> str:
        """As much as two sequences in a micro-batch, as long as there are enough micro-batches for DualPipeV."""
        micro = 2 if SEQUENCES // (self.ep * self.edp) // 2 >= 2 * self.pp else 1
        layout = " ".join(self.overrides())
        return f"{MODEL} train.steps={steps} train.micro_batch_size={micro} {layout} {self.more}"


def train(folder: Path, cases: Sequence[Case], steps: int) -> None:
    """Train each case into the folder of its name; one launch for each number of ranks."""
    if not (folder / "small.yaml").exists():
        write_inputs(folder)
    for world in sorted({case.world for case in cases}):
        lines = [f"run_dir={folder}/{case.folder} {case.line(steps)}" for case in cases if case.world == world]
        for outcome in run_ranks(
            world, "tests.distributed.train_many", f"{folder}/small.yaml", *lines, timeout=60 + 120 * len(lines)
        ):
            assert outcome == ["done"] * len(lines), outcome


def compare(folder: Path, cases: Sequence[Case], steps: int, reference: Case) -> dict[Case, Difference]:
    """The trained cases against one process."""
    return {case: difference(folder / reference.folder, folder / case.folder, steps) for case in cases}
