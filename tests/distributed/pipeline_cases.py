"""On two ranks: how often a pipeline runs its layers, and what it writes down.

Reports what tests/distributed/test_pipelines.py judges.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed

from tests.distributed.matrix import Case
from tests.distributed.ranks import report
from tests.small import small_config
from trainer.loop import Loop
from trainer.model.layer import TransformerLayer
from trainer.setup import prepare


def count_forwards() -> Counter[str]:
    """Calls of every layer from now on, told apart by whether gradients are wanted of what they compute."""
    calls: Counter[str] = Counter()
    real = TransformerLayer.forward

    def counted(self: TransformerLayer, *arguments: Any) -> Any:
        calls["layers"] += 1
        return real(self, *arguments)

    TransformerLayer.forward = counted  # type: ignore[method-assign]
    return calls


def main() -> None:
    path, folder = sys.argv[1:]
    found: dict[str, Any] = {}
    for schedule in ("1f1b", "zbv", "interleaved-zero-bubble"):
        overrides = Case(schedule, pp=2, recompute=True).line(2).split()
        quiet = ["metrics.trace_step=2", "train.eval_every=0", "train.eval_sequences=1", "checkpoint.every=0"]
        run_dir = f"{folder}/{schedule}"
        run = prepare(small_config(Path(path), *overrides, *quiet, f"run_dir={run_dir}"), path, False)
        loop = Loop(run)
        calls = count_forwards()
        loop.evaluate = lambda: 0.0  # type: ignore[method-assign]
        loop.train()
        layers = len(run.model.layers) + len(run.model.mtp)
        found[schedule] = {"calls": calls["layers"], "expected": 2 * 2 * run.pipeline.micro_batches * layers}
    found["shm_comm"] = deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]
    report(found)


if __name__ == "__main__":
    main()
