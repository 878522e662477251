"""What is kept of a tensor: a few sums, a sketch and samples, all of which add up over pieces, ranks and micro-batches.

Nothing here depends on how a tensor is cut into pieces: every element is known by its place in the whole.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BUCKETS, SAMPLES = 8, 4
COUNT, SUM, SQUARE, LARGEST = range(4)  # the first figures of a row; behind them come the sketch and the samples
SKETCH = slice(4, 4 + BUCKETS)
SAMPLED = slice(4 + BUCKETS, 4 + BUCKETS + SAMPLES)
WIDTH = 4 + BUCKETS + SAMPLES

_BLOCK = 2**16  # elements that are looked at at once: the only copy that is made
_ODD = -7046029254386353131  # 2^64 over the golden ratio, as a signed number


def row_of(values: Tensor, offset: int | None = None, whole: int = 0) -> np.ndarray:
    """The row (WIDTH,), fp64, of one piece of a tensor; :func:`add` makes one of several.

    The sketch is a count sketch (Charikar et al. 2002): each element goes with a random sign into a random bucket. It
    is linear, and the expected square sum of its buckets is the tensor's: the sketch of a difference tells its norm.

    Args:
        values: any shape, dtype and device.
        offset: place of the first element in the flattened whole; None: places mean nothing, so that there is neither
            sketch nor sample.
        whole: elements of the whole.
    """
    row = np.zeros(WIDTH)
    places = _hash(torch.arange(1, SAMPLES + 1)).remainder(max(whole, 1)).numpy()
    for block in _blocks(values.detach()):
        block = block.to("cpu", torch.float64)  # every device sums in the same order, also one without fp64
        if not block.numel():
            continue
        row[COUNT] += block.numel()
        row[SUM] += float(block.sum())
        row[SQUARE] += float(block.square().sum())
        row[LARGEST] = np.maximum(row[LARGEST], float(block.abs().max()))  # keeps NaN
        if offset is None:
            continue
        mixed = _hash(torch.arange(offset, offset + block.numel()))
        signed = torch.where((mixed >> 8) & 1 == 1, block, -block)
        row[SKETCH] += torch.bincount(mixed & (BUCKETS - 1), signed, BUCKETS).numpy()
        here = (places >= offset) & (places < offset + block.numel())
        row[SAMPLED][here] += block.numpy()[places[here] - offset]
        offset += block.numel()
    return row


def add(one: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    """The row of two pieces."""
    if one is None:
        return other
    both = one + other
    both[LARGEST] = np.maximum(one[LARGEST], other[LARGEST])
    return both


def _blocks(values: Tensor) -> list[Tensor] | tuple[Tensor, ...]:
    """The elements in order, a block at a time; views where that is possible."""
    if values.is_contiguous():
        return values.view(-1).split(_BLOCK)
    if values.numel() <= _BLOCK:
        return (values.reshape(-1),)
    return [block for part in values.unbind(0) for block in _blocks(part)]


def _hash(numbers: Tensor) -> Tensor:
    """int64 that look random, the same on every machine: multiplication wraps around."""
    mixed = numbers * _ODD
    mixed = (mixed ^ (mixed >> 32)) * _ODD
    return mixed ^ (mixed >> 29)
