"""On two ranks: saving and loading a model large enough that memory says something, and what fails on one rank only.

Reports a dictionary of findings that tests/distributed/test_checkpoints.py judges.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import backends
from backends import UserError
from parallel import topology
from parallel.config import ParallelConfig
from parallel.failures import is_lost_peer
from tests.distributed.ranks import report
from tests.small import small_config
from trainer import checkpoint
from trainer.checkpoint import manifest
from trainer.checkpoint.together import together
from trainer.setup import Run, prepare

# 38 million parameters: 456 MB of weights and moments.
LARGE = (
    "model.hidden_size=512 model.moe.num_experts=16 model.moe.expert_hidden_size=512 model.attention.num_heads=1 "
    "metrics.tensorboard=false"
).split()


def peak_growth(work: Callable[[], Any]) -> int:
    """Bytes by which the resident memory of this process grows at most while ``work`` runs."""

    def memory(key: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = memory("VmRSS:")
    work()
    return memory("VmHWM:") - before


def saver(run: Run) -> checkpoint.Saver:
    return checkpoint.Saver(run.run_dir, run.model, run.engine, run.config, run.tokenizer)


def save_and_load(path: Path, *overrides: str) -> dict[str, Any]:
    """Saved twice and loaded, by data-parallel ranks."""
    run = prepare(small_config(path, *overrides), str(path), resume=False)
    torch.randn(1 << 22).add_(1.0)  # the pool of OpenMP threads is there
    threads = len(os.listdir("/proc/self/task"))

    def save(step: int) -> None:
        made.save(step, {"tokens": 0, "data": run.training.state_dict()})
        made.wait()

    with saver(run) as made:
        saving = peak_growth(lambda: save(1))
        again = peak_growth(lambda: save(2))
        pool = len(os.listdir("/proc/self/task")) - threads
    state = [tensor for shard in run.engine.shards() for tensor in shard.state.values()]
    return {
        "shard": sum(tensor.nbytes for tensor in state),
        "largest": max(tensor.nbytes for tensor in state),
        "saving": saving,
        "saving_again": again,
        "threads": pool,
        "loading": load(run),
    }


def load(run: Run) -> int:
    newest = checkpoint.newest(run.run_dir)
    assert newest is not None
    return peak_growth(lambda: checkpoint.load(newest, run.model, run.engine, run.config, "here"))


def large(path: Path, run_dir: Path, asynchronous: bool) -> dict[str, Any]:
    """Memory, in bytes, where data-parallel ranks save and load, and where expert-parallel ones load the same."""
    torch.set_num_threads(2)
    overrides = [*LARGE, f"run_dir={run_dir}", f"checkpoint.asynchronous={asynchronous}"]
    found = save_and_load(path, *overrides)
    found["loading_elsewhere"] = load(
        prepare(small_config(path, *overrides, "parallel.expert=2"), str(path), resume=True)
    )
    torch.set_num_threads(1)
    return found


def one_disk_is_full(path: Path, run_dir: Path) -> list[str]:
    """Rank 1 cannot write: both hear of it, and the next save is whole."""
    run = prepare(small_config(path, f"run_dir={run_dir}"), str(path), resume=False)
    told = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with saver(run) as made:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        made.save(1, {})
        try:
            made.save(2, {})
        except UserError as error:
            told.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        told.append(str(checkpoint.newest(run_dir)))
        made.save(3, {})
    newest = checkpoint.newest(run_dir)
    assert newest is not None
    return [*told, newest.name, *manifest.damages(newest)]


def failure_of_one() -> str:
    """What both hear when rank 1 alone fails."""

    def work() -> None:
        if dist.get_rank() == 1:
            raise ValueError("a nonsense")

    try:
        together(work)
    except UserError as error:
        return str(error)
    return ""


def silent_peer() -> str:
    """Rank 1 does not come: the limit of the config holds for the groups of the mesh."""
    place = topology.start(backends.select("cpu"), ParallelConfig(timeout_minutes=0.02))
    if place.rank == 1:
        time.sleep(4)
        return "came late"
    try:
        topology.sum_over(place.dp, torch.zeros(1))
    except RuntimeError as error:
        return "lost" if is_lost_peer(error) else str(error)
    return "summed"


def main() -> None:
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    found = {
        "one_disk_is_full": one_disk_is_full(path, folder / "full"),
        "failure_of_one": failure_of_one(),
    }
    for asynchronous in (True, False) if "large" in sys.argv else ():
        found[f"large-{asynchronous}"] = large(path, folder / f"large-{asynchronous}", asynchronous)
    found["silent_peer"] = silent_peer()
    report(found)


if __name__ == "__main__":
    main()
