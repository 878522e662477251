"""Layouts whose traces must be the same, and traces of several layouts or faults in one launch for each world size."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.distributed.ranks import run_ranks

# As in tests/distributed/matrix.py: the seed keeps every choice of an expert away from a tie, and a micro-batch of one
# sequence is the most that four ranks and a pipeline leave. MLA, experts with bias, and multi-token prediction.
MODEL = "model.num_layers=4 model.dense_layers=2 data.sequence_length=16 train.global_batch_tokens=128 seed=8"


class Case(NamedTuple):
    """One trace."""

    name: str
    ranks: int
    overrides: str
    fault: str = ""


LAYOUTS = [
    Case("one", 1, "train.micro_batch_size=2"),
    Case("one-micro-1", 1, "train.micro_batch_size=1"),
    Case("one-micro-8-recompute", 1, "train.micro_batch_size=8 train.activation_checkpointing=layer"),
    Case("dp2", 2, "train.micro_batch_size=2"),
    Case("ep2", 2, "train.micro_batch_size=2 parallel.expert=2"),
    Case("dp2-zero2", 2, "train.micro_batch_size=2 parallel.zero=2"),
    Case("pp2", 2, "train.micro_batch_size=2 parallel.pipeline=2 parallel.layers_per_stage=[2,2]"),
    Case("pp2-recompute", 2, "train.micro_batch_size=2 parallel.pipeline=2 train.activation_checkpointing=layer"),
    Case("zbv-pp2", 2, "train.micro_batch_size=2 parallel.pipeline=2 parallel.schedule=zbv"),
    Case("edp2-ep2", 4, "train.micro_batch_size=1 parallel.expert=2"),
    Case("pp2-ep2", 4, "train.micro_batch_size=1 parallel.pipeline=2 parallel.expert=2"),
    Case(
        "dualpipev-pp2-ep2",
        4,
        "train.micro_batch_size=1 parallel.pipeline=2 parallel.schedule=dualpipev "
        "parallel.expert=2 train.activation_checkpointing=layer",
    ),
]


def record_all(config: Path, folder: Path, cases: Sequence[Case]) -> None:
    """Record every case into the folder of its name; one launch for each number of ranks."""
    for ranks in sorted({case.ranks for case in cases}):
        lines = [f"{case.name}|{case.fault}|{MODEL} {case.overrides}" for case in cases if case.ranks == ranks]
        run_ranks(ranks, "tests.verify.record_many", str(config), str(folder), *lines, timeout=120 + 60 * len(lines))
