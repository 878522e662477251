"""On every rank: load a run's newest checkpoint and write it again, from this layout's shards."""

import sys
from pathlib import Path

from tests.distributed.ranks import report
from tests.small import small_config
from trainer import checkpoint
from trainer.setup import prepare


def main() -> None:
    path, line = sys.argv[1:]
    config = small_config(Path(path), *(o for o in line.split() if o != "--resume"))
    run = prepare(config, path, resume=True)
    state = {"tokens": run.tokens, "data": run.training.state_dict()}
    with checkpoint.Saver(run.run_dir, run.model, run.engine, config, run.tokenizer) as saver:
        saver.save(run.step, state)
    written = checkpoint.newest(run.run_dir)
    report(written and written.name)


if __name__ == "__main__":
    main()
