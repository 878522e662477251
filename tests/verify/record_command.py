"""On every rank: `moebius verify record` with the arguments given. Reports its exit code."""

import sys

from launch.verify.record import main
from tests.distributed.ranks import report

if __name__ == "__main__":
    report(main(sys.argv[1:]))
