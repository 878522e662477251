"""When Python looks for reference cycles: between steps, where a device waits for the host.

By itself it does so after some thousands of allocations, in the middle of a step, and at another time on each rank. An
accelerator then runs out of work, and all ranks wait for the slowest.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def collected_between_steps(device: torch.device) -> Iterator[Callable[[], object]]:
    """Inside, garbage is collected only by calling what this gives. On the CPU, where nothing waits, nothing changes.

    What exists at the start (the model, the optimizer, every module) is not looked at any more: a collection takes
    milliseconds.
    """
    if device.type == "cpu":
        yield lambda: None
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()
