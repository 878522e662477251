"""Bytes that a build and two steps take at most: on every rank of a layout, or what a dry run predicts for one.

Arguments: ``measure``, or ``predict`` and "ranks,rank"; then a config and overrides. test_dry_run.py judges.
"""

import sys
from pathlib import Path

import torch

import backends
from parallel import topology
from tests.distributed.checkpoint_cases import peak_growth
from tests.distributed.ranks import report
from tests.small import small_config
from trainer.build import build
from trainer.config.schema import Config
from trainer.data import Batch
from trainer.dry_run import predict
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
            step.run(batch(config, step.sequences // place.dp.size, place.dp.rank), number, lambda: False)

    return peak_growth(work)


def main() -> None:
    import deepspeed  # noqa: F401  (its modules are no part of a model's memory)

    if sys.argv[1] == "measure":
        path, *overrides = sys.argv[2:]
        report(measured(small_config(Path(path), *overrides)))
    else:
        place, path, *overrides = sys.argv[2:]
        world, rank = map(int, place.split(","))
        found = predict(small_config(Path(path), *overrides), path, world, rank)
        report(max(found.building, found.peak))


if __name__ == "__main__":
    main()
