"""How many floating-point operations a device can do in a second: published where known, else measured."""

import json
import os
import time
from pathlib import Path

import torch

# Dense (no sparsity) TFLOP/s of tensor-core matrix multiplies, from the makers' data sheets: NVIDIA H100, H200,
# A100, L40S, V100 and T4 data sheets; fp32 is TF32 off. Matched in order within the device's name.
_PUBLISHED: tuple[tuple[str, dict[torch.dtype, float]], ...] = (
    ("H200", {torch.bfloat16: 989.4, torch.float16: 989.4, torch.float32: 66.9, torch.float64: 66.9}),
    ("H100 PCIe", {torch.bfloat16: 756.0, torch.float16: 756.0, torch.float32: 51.2, torch.float64: 51.2}),
    ("H100 NVL", {torch.bfloat16: 835.0, torch.float16: 835.0, torch.float32: 60.0, torch.float64: 60.0}),
    ("H100", {torch.bfloat16: 989.4, torch.float16: 989.4, torch.float32: 66.9, torch.float64: 66.9}),
    ("A100", {torch.bfloat16: 312.0, torch.float16: 312.0, torch.float32: 19.5, torch.float64: 19.5}),
    ("A800", {torch.bfloat16: 312.0, torch.float16: 312.0, torch.float32: 19.5, torch.float64: 19.5}),
    ("L40S", {torch.bfloat16: 362.0, torch.float16: 362.0, torch.float32: 91.6}),
    ("V100", {torch.float16: 125.0, torch.float32: 15.7, torch.float64: 7.8}),
    ("T4", {torch.float16: 65.0, torch.float32: 8.1}),
)


def published(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s from the maker's data sheet, or None where we know none."""
    for part, figures in _PUBLISHED:
        if part in device_name:
            return figures[dtype] * 1e12 if dtype in figures else None
    return None


def cache_file() -> Path:
    """Where measured figures are kept."""
    return Path("~/.cache/moebius/peak_flops.json").expanduser()


def measured(device: torch.device, device_name: str, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix multiply: the most ever seen for this device, thread count and torch version.

    Each call measures shortly and keeps the better of that and the cached figure, so that a figure taken while the
    machine was busy does not stay. A cache that cannot be read or written is done without.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    key = f"{device_name}|threads={threads}|torch={torch.__version__}|{str(dtype).removeprefix('torch.')}"
    known = _read_cache().get(key)
    best = known if isinstance(known, float) and known > 0 else 0.0
    value = _measure(device, dtype, seconds)
    if value > best:
        _write_cache({**_read_cache(), key: value})
    return max(value, best)


def _measure(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    # Large enough to be compute-bound; small enough that slow formats stay near the time limit.
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _read_cache() -> dict[str, float]:
    try:
        known = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(known: dict[str, float]) -> None:
    path = cache_file()
    partial = path.with_suffix(f".{os.getpid()}")  # several ranks may write: the last whole file stays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=1, sort_keys=True))
        partial.replace(path)
    except OSError:
        return
