"""`moebius verify`: whether two ways to train are the same, and where they part. A file for each subcommand."""

import traceback

from launch.arguments import choose
from launch.errors import USER_ERROR

COMMANDS = {
    "ops": "check every operation of a config's model against its definition in float64",
    "record": "write a trace of a few training steps",
    "compare": "compare two traces, and name the first difference",
    "layouts": "compare every layout of N processes with one process",
    "run": "compare the metrics of two long runs",
}


def main(argv: list[str]) -> int:
    """Run ``moebius verify <command> ...``; each is the ``main(argv)`` of the module of that name."""
    description = "Compare operations, steps, layouts and whole runs with what they should be."
    epilog = "Exit codes: 0 same, 1 different, 2 could not be compared. `moebius verify <command> --help` says more."
    try:
        return choose("moebius verify", description, COMMANDS, epilog, "launch.verify", argv)
    except Exception:  # a bug of ours; Python's own exit code for it would say "different"
        traceback.print_exc()
        return USER_ERROR
