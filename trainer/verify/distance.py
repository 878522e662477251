"""How far two readings of the same thing are from each other, in units of their own size."""

from __future__ import annotations

import math

import numpy as np

from trainer.verify.sums import COUNT, LARGEST, SKETCH, SQUARE, SUM

# Sums over ranks of what each has: only the linear figures of a row mean anything.
LINEAR = frozenset({"loss", "total", "contribution", "update"})


def size_of(row: np.ndarray, kind: str) -> float:
    """The norm of what the row is of; for linear ones as the sketch estimates it."""
    return float(np.linalg.norm(row[SKETCH])) if kind in LINEAR else math.sqrt(row[SQUARE])


def distance(one: np.ndarray, other: np.ndarray, kind: str) -> float:
    """Relative: the largest of the differences' norm and of the differences of norms, means and largest values.

    Infinite where something is not finite in one only, or where the numbers of elements differ.
    """
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return 0.0 if np.array_equal(one, other, equal_nan=True) else math.inf
    size = max(size_of(one, kind), size_of(other, kind))
    if size == 0:
        return 0.0
    found = float(np.linalg.norm(one[SKETCH] - other[SKETCH])) / size
    if kind in LINEAR:
        return found
    if one[COUNT] != other[COUNT]:
        return math.inf
    apart = abs(math.sqrt(one[SQUARE]) - math.sqrt(other[SQUARE])) / size
    means = abs(one[SUM] - other[SUM]) / math.sqrt(one[COUNT]) / size
    largest = max(one[LARGEST], other[LARGEST])
    return max(found, apart, means, abs(one[LARGEST] - other[LARGEST]) / largest)
