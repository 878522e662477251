"""Facts about the CPU and this process's memory on it, from /proc where there is one."""

import functools
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from backends.base import MemoryStats


@functools.cache
def model_name() -> str:
    """The processor's model name, with the architecture where the name is unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the processor has bf16 dot products or matrix units.

    Read from its feature flags, not timed: every rank must come to the same answer, or losses differ between ranks.
    """
    flags = torch.cpu.get_capabilities()
    return any(flags.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "arm_bf16", "sve_bf16"))


def share_cores() -> None:
    """Give each rank of this machine its share of the cores, unless ``OMP_NUM_THREADS`` says otherwise.

    The deepspeed launcher leaves every rank with threads for all cores, and they would wait for each other.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def memory() -> MemoryStats:
    """Resident set, its peak, and the machine's memory, in bytes."""
    fields = {}
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                fields[name] = int(value.split()[0]) * 1024
    except OSError:
        pass
    # ru_maxrss counts kilobytes, on macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MemoryStats(fields.get("VmRSS", peak), fields.get("VmHWM", peak), total)


def reset_peak_memory() -> None:
    """Start the peak anew (proc(5), clear_refs); where the kernel forbids it the peak stays that of the process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
