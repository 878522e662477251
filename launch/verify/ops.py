"""`moebius verify ops`: whether every operation of a config's model is as exact as plain torch in its dtype."""

from __future__ import annotations

import argparse

from launch.arguments import ConfigParser, count
from launch.errors import run
from launch.verify.output import add_outputs, finish


def main(argv: list[str]) -> int:
    """Capture the operations that a config's model calls, run each, and report."""
    parser = ConfigParser(
        "moebius verify ops",
        "Run every operation that a config's model calls in training, at its own shapes and dtypes, forward and "
        "backward, and compare it with its definition in float64 on the CPU, beside the error of plain torch.",
    )
    add = parser.add_argument
    add("--backend", choices=("auto", "cpu", "cuda", "ascend"), help="whose operations (default: the config's)")
    add("--tokens", metavar="N", type=count, default=512, help="most tokens of the micro-batch (512)")
    add("--elements", metavar="N", type=count, default=2**22, help="most elements of a tensor (4194304)")
    add_outputs(parser)
    args = parser.parse(argv)
    return run(lambda: _ops(args), debug=False)


def _ops(args: argparse.Namespace) -> int:
    from trainer.config.load import load_config

    config = load_config(args.config, args.overrides)

    import backends
    from trainer.verify.ops import verify

    backend = backends.select(args.backend or config.backend)
    where = " ".join([args.config, *args.overrides])
    return finish(verify(config, where, backend.ops, backend.device, args.tokens, args.elements), args)
