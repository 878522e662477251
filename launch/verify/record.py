"""`moebius verify record`: a few training steps as a trace, which another run's can be compared with."""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # started as a file: the launcher puts this folder on the path, not the repository's root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.arguments import ConfigParser, count
from launch.errors import run


def main(argv: list[str]) -> int:
    """Record a trace of the run of ``--config``, alone or under a launcher."""
    parser = ConfigParser(
        "moebius verify record",
        "Train a few steps, once as configured and once at learning rate 0, and write down data, weights, what every "
        "module gives, choices of experts, gradients and updates. Several ranks: deepspeed --num_accelerators N "
        "launch/verify/record.py ...",
    )
    add = parser.add_argument
    add("--out", metavar="DIR", required=True, help="folder for trace.json and trace.npz")
    add("--steps", metavar="N", type=count, default=3, help="steps of either run (3)")
    add("--noise", action="store_true", help="measure the noise floor: train once more, summed in another order")
    add("--debug", action="store_true", help="show tracebacks instead of one line")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by deepspeed
    args = parser.parse(argv)
    return run(lambda: _record(args), args.debug)


def _record(args: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from trainer.config.load import load_with_origins

    config, origins = load_with_origins(args.config, args.overrides)

    from launch.show import announce
    from parallel.agreement import together
    from parallel.topology import stop
    from trainer.verify.record import record
    from trainer.verify.trace import NUMBERS, check_vacant

    announce()
    announce("trainer.verify")
    with together() if "RANK" in os.environ else nullcontext(), origins.named():
        check_vacant(Path(args.out))
        try:
            trace = record(config, args.config, Path(args.out), args.steps, args.noise)
        finally:
            stop()
    if trace is not None:
        size = (Path(args.out) / NUMBERS).stat().st_size
        steps = f"{args.steps} step{'s' * (args.steps > 1)}"
        print(f"{args.out}: {steps}, {len(trace.rows):,} readings, {size / 1000:,.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
