"""On every rank: the memory that a real build and two real steps take at most, beside what a dry run says of it.

Arguments: a config and overrides. Reports measured and predicted bytes, which tests/distributed/test_dry_run.py judges.
"""

import os
import sys
from pathlib import Path

import torch

import backends
from parallel import topology
from tests.distributed.checkpoint_cases import peak_growth
from tests.distributed.ranks import report
from trainer.build import build
from tests.small import small_config
from trainer.config.schema import Config
from trainer.data import Batch
from trainer.step import Step


def batch(config: Config, sequences: int, seed: int) -> Batch:
    """Random tokens, which an untrained router sends to its experts in nearly even shares."""
    length = config.data.sequence_length
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.model.vocab_size, (sequences, length + 1), generator=draw)
    zeros = torch.zeros(sequences, length, dtype=torch.int64)
    return Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone(), torch.arange(length).repeat(sequences, 1), zeros)


def measured(config: Config) -> int:
    backend = backends.select("cpu")
    place = topology.start(backend, config.parallel)
    torch.randn(1 << 20).add_(1.0)  # libraries are loaded and threads are there

    def work() -> None:
        model, engine, pipeline = build(config, place, backend)
        step = Step(config, place, backend.device, model, engine, pipeline)
        for number in (1, 2):
            step.run(batch(config, step.sequences // place.dp.size, place.dp.rank), number, False)

    return peak_growth(work)


def main() -> None:
    path, *overrides = sys.argv[1:]
    import deepspeed  # noqa: F401  (its modules are no part of a model's memory)

    report(measured(small_config(Path(path), *overrides)))


if __name__ == "__main__":
    main()
