"""On every rank: train one config under several overrides in turn, in one process group.

Arguments: the config's path, then overrides of one run a argument, separated by spaces; ``--resume`` among them
resumes. Reports each run's exit: "done" or the error's text.
"""

import sys
from pathlib import Path

from backends import UserError
from parallel import buckets
from tests.distributed.ranks import report
from tests.small import small_config
from trainer.loop import Loop
from trainer.setup import prepare


def main() -> None:
    path, *runs = sys.argv[1:]
    buckets.BUCKET_BYTES = 20_000  # the small model gets several, with many weights and with one
    outcomes = []
    for line in runs:
        overrides = line.split()
        resume = "--resume" in overrides
        config = small_config(Path(path), *(o for o in overrides if o != "--resume"))
        try:
            Loop(prepare(config, path, resume)).train()
            outcomes.append("done")
        except UserError as error:
            outcomes.append(str(error))
    report(outcomes)


if __name__ == "__main__":
    main()
