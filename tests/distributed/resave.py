"""On every rank: load a run's newest checkpoint and write it again, from this layout's shards."""

import sys
from pathlib import Path

from parallel import topology
from tests.distributed.ranks import report
from tests.small import small_config
from trainer import checkpoint
from trainer.setup import prepare


def main() -> None:
    path, line = sys.argv[1:]
    config = small_config(Path(path), *(o for o in line.split() if o != "--resume"))
    run = prepare(config, path, resume=True)
    state = {"tokens": run.tokens, "data": run.training.state_dict()}
    written = checkpoint.save(run.run_dir, run.step, run.model, run.engine, state, config, run.tokenizer)
    topology.stop()
    report(written.name)


if __name__ == "__main__":
    main()
