"""In processes of their own, because DeepSpeed keeps pieces of the first process group: predictions for small layouts.

Reports what tests/trainer/test_dry_run.py judges.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed.ranks import report
from tests.small import small_config
from trainer.dry_run import operations, predict, prediction

SCHEDULES = ("1f1b", "interleaved", "interleaved-zero-bubble", "zbv", "dualpipev")


LAYOUT = ("parallel.pipeline=2", "parallel.expert=2", "train.global_batch_tokens=2048")


def told(path: Path, world: int, rank: int, overrides: Sequence[str], imbalance: float, whole: bool) -> dict[str, Any]:
    """A prediction as JSON values; of all micro-batches, and by nothing but torch's own fakes, if ``whole``."""
    with ExitStack() as stack:
        if whole:
            stack.enter_context(mock.patch.object(prediction, "_shorter", lambda config, _: (config, Fraction(1))))
            stack.enter_context(mock.patch.object(operations, "_on_meta", lambda _: False))
        found = predict(small_config(path, *overrides), "here", world, rank, imbalance)
    return {**vars(found), "sent": {" ".join(key): list(asdict(sent).values()) for key, sent in found.sent.items()}}


def main() -> None:
    path = Path(sys.argv[1])
    import deepspeed  # noqa: F401  (once, before processes divide)

    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:

        def of(world: int, rank: int, *overrides: str, imbalance: float = 1.0, whole: bool = False) -> Any:
            return pool.apply(told, (path, world, rank, overrides, imbalance, whole))

        found: dict[str, Any] = {}
        if "schedules" in sys.argv:
            for schedule in SCHEDULES:
                pipeline = "parallel.pipeline=2", f"parallel.schedule={schedule}", "model.num_layers=4"
                found[schedule] = [of(2, 0, *pipeline, whole=whole) for whole in (False, True)]
            found["none"] = [of(1, 0, "train.global_batch_tokens=512", whole=whole) for whole in (False, True)]
        else:
            found = {
                "alone": of(1, 0),
                "narrow": of(1, 0, "train.precision=bf16"),
                "first": of(8, 0, *LAYOUT),
                "last": of(8, 7, *LAYOUT, "train.precision=bf16"),
                "busy": of(8, 0, *LAYOUT, imbalance=1.5),
                "uneven": of(1, 0, "train.global_batch_tokens=192", "train.micro_batch_size=4"),
                "roomy": of(2, 0, "parallel.expert=2", "train.global_batch_tokens=128", "train.micro_batch_size=4"),
                "zero-2": of(4, 3, "parallel.zero=2", "train.global_batch_tokens=1024"),
            }
    report(found)


if __name__ == "__main__":
    main()
