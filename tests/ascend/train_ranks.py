"""On every rank: train one config on the simulated NPU under several overrides in turn, in one process group.

Arguments: the config's path, then overrides of one run an argument, separated by spaces. Reports the operators
called, and for each step whether Python may collect garbage in it.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import backends
from backends.ascend import AscendBackend
from backends.cpu import CpuBackend
from parallel.pipeline import overlap
from tests.ascend.executor import HostExecutor
from tests.distributed.ranks import report
from tests.small import small_config


def one_by_one(operations: list[dist.P2POp]) -> list[dist.Work]:
    """As torch does it over gloo; torch_npu's own asks HCCL for a batch."""
    sides = {dist.isend: "group_dst", dist.irecv: "group_src"}
    return [op.op(op.tensor, group=op.group, tag=op.tag, **{sides[op.op]: op.group_peer}) for op in operations]


def compute_in_backwards(executor: HostExecutor) -> None:
    """Dispatch modes are a thread's own, and DualPipeV's backwards have one: it enters another with the same counts."""

    def enter(device: torch.device, real: Callable[[torch.device], None] = overlap._enter) -> None:
        real(device)
        own = HostExecutor()
        own.called = executor.called
        own.__enter__()

    overlap._enter = enter


def main() -> None:
    path, *runs = sys.argv[1:]
    AscendBackend.distributed_backend = "gloo"  # there is no HCCL
    AscendBackend.group_options = CpuBackend.group_options
    backends.select("ascend")  # DeepSpeed chooses its accelerator when it is imported
    dist.batch_isend_irecv = one_by_one
    from trainer.loop import Loop
    from trainer.setup import prepare

    collecting: list[bool] = []
    with HostExecutor() as executor:
        compute_in_backwards(executor)
        for line in runs:
            loop = Loop(prepare(small_config(Path(path), "backend=ascend", *line.split()), path, False))
            step = loop.step.run
            loop.step.run = lambda *given, step=step: (collecting.append(gc.isenabled()), step(*given))[1]
            loop.train()
    report({"called": executor.called, "collecting": collecting})


if __name__ == "__main__":
    main()
