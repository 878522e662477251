"""Process settings that must be in place before torch allocates its first tensor.

A training step frees and allocates hundreds of large buffers. glibc's defaults give each of them to the kernel
and fetch it back as fresh zeroed pages of 4 KiB: where page faults are slow (virtual machines above all) that
costs more than the arithmetic. Keeping freed memory in the heap, in huge pages, took twenty allocations of
64 MB from 0.64 s to 0.07 s on a 2-core virtual machine.
"""

import ctypes
import os
import sys

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def prepare() -> None:
    """Set what the environment does not already say. Harmless where it does not apply, and when called again."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for transparent huge pages
    # `import torch` would import torch_npu where it is installed, and fail where CANN is not: ascend_state.py loads it.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    if sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        _keep_freed_memory()


def _keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory instead of returning it to the kernel; False where there is no glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (musl has a mallopt too, which does nothing)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    # Large blocks come from the heap, not from mmap; the heap is never trimmed; and one arena serves all
    # threads, so that the backward thread reuses what the forward thread freed.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_ARENA_MAX, 1))
