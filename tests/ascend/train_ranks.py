"""On every rank: train one config on the simulated NPU under several overrides in turn, in one process group.

Arguments: the config's path, then overrides of one run an argument, separated by spaces. Reports the operators called.
"""

import sys
from pathlib import Path

import backends
from backends.ascend import AscendBackend
from backends.cpu import CpuBackend
from tests.ascend.executor import HostExecutor
from tests.distributed.ranks import report
from tests.small import small_config


def main() -> None:
    path, *runs = sys.argv[1:]
    AscendBackend.distributed_backend = "gloo"  # there is no HCCL
    AscendBackend.group_options = CpuBackend.group_options
    backends.select("ascend")  # DeepSpeed chooses its accelerator when it is imported
    from trainer.loop import Loop
    from trainer.setup import prepare

    with HostExecutor() as executor:
        for line in runs:
            Loop(prepare(small_config(Path(path), "backend=ascend", *line.split()), path, False)).train()
    report(executor.called)


if __name__ == "__main__":
    main()
