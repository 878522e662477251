"""From numbers to the likely class of a fault, as far as they support one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trainer.verify.readings import Key
from trainer.verify.sums import COUNT, LARGEST, SAMPLED, SKETCH, SQUARE

_CONSTANT = 1e-3  # of a ratio: relative spread below which it is one number
BF16 = 2.0**-8  # spacing of bf16 numbers, relative


class Relation(NamedTuple):
    """How one tensor comes from another: ``ratio`` times it, and a rest relative to its own size."""

    ratio: float
    rest: float

    @property
    def scaled(self) -> bool:
        """A constant other than 1, and nothing else."""
        return self.rest < _CONSTANT and abs(self.ratio - 1) > _CONSTANT

    @property
    def rounded(self) -> bool:
        """As far apart as rounding to bf16, once or a few times, would bring them."""
        return abs(self.ratio - 1) < 4 * BF16 and BF16 / 32 < self.rest < 2 * BF16


def multiple(ratio: float) -> bool:
    """Whether it is a small whole number other than 1, or 1 divided by one, as counts of ranks and batches are."""
    whole = ratio if abs(ratio) > 1 else 1 / ratio if ratio else math.nan
    return 1.5 < abs(whole) < 2**16 and abs(whole - round(whole)) < _CONSTANT * abs(whole) / 2


def relation(one: np.ndarray, other: np.ndarray) -> Relation:
    """Of two rows that have sketches."""
    a, b = one[SKETCH], other[SKETCH]
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or not a.any():
        return Relation(math.nan, math.inf)
    ratio = float(a @ b / (a @ a))
    size = float(np.linalg.norm(b))
    return Relation(ratio, float(np.linalg.norm(b - ratio * a)) / size if size else 0.0)


def in_bf16(row: np.ndarray) -> bool:
    """Whether the sampled values are numbers of bf16, which four fp32 numbers are by chance once in 2^64."""
    samples = row[SAMPLED].astype(np.float32)
    return bool(samples.any() and not (samples.view(np.uint32) & 0xFFFF).any())


def times(ratio: float, layout: Mapping[str, int]) -> str:
    """A ratio in words, with the axis of the layout that it may come from."""
    sizes = {**layout, "dp": layout["edp"] * layout["ep"]}
    for axis, size in sizes.items():
        if size > 1 and abs(ratio - size) < _CONSTANT * size:
            return f"{ratio:.4g} times ({axis})"
        if size > 1 and abs(ratio * size - 1) < _CONSTANT:
            return f"{ratio:.4g} times (1/{axis})"
    return f"{ratio:.4g} times"


def of_rows(one: np.ndarray, other: np.ndarray, layout: Mapping[str, int]) -> tuple[str, str]:
    """Class and evidence of two tensors that differ."""
    if not np.isfinite(other).all():
        return "not finite", "NaN or infinity in the second trace"
    if other[COUNT] != one[COUNT] and not one[SKETCH].any():
        return "other tokens", f"{other[COUNT]:.0f} values instead of {one[COUNT]:.0f}"
    if one[LARGEST] and not other[LARGEST]:
        return "missing", "all zeros in the second trace only"
    if not one[SKETCH].any():
        return "other values", f"rms {rms(other):.6g} instead of {rms(one):.6g}"
    found = relation(one, other)
    if found.scaled:
        return "scaling", f"{times(found.ratio, layout)} the first, the rest {found.rest:.1e}"
    if in_bf16(other) and not in_bf16(one):
        return "precision", f"samples are numbers of bf16 in the second trace only, {found.rest:.1e} apart"
    if found.rounded:
        return "precision", f"{found.rest:.1e} apart, as rounding to bf16 (2^-9 = {BF16 / 2:.1e}) would give"
    return "other values", f"{found.rest:.1e} apart, rms {rms(other):.6g} instead of {rms(one):.6g}"


def of_reduction(pairs: Sequence[tuple[Key, np.ndarray, np.ndarray]], layout: Mapping[str, int]) -> tuple[str, str]:
    """Class and evidence where ranks contribute the same gradients, and the sums differ all the same."""
    name, found = pairs[0][0].name, relation(pairs[0][1], pairs[0][2])
    experts = all(".experts." in key.name for key, _, _ in pairs)
    of = "one gradient" if len(pairs) == 1 else f"{len(pairs)} gradients{', of experts only' if experts else ''}"
    counted = f"{of}; ranks' contributions agree"
    if found.scaled:
        return "reduction scaling", f"{times(found.ratio, layout)} the first; {counted}"
    if in_bf16(pairs[0][2]) or found.rounded:
        return "precision", f"{found.rest:.1e} apart, as bf16 would be; {counted}"
    share = [rms(other) / rms(one) if one[SQUARE] else math.inf for _, one, other in pairs]
    over = "replicas of experts (edp)" if experts else "replicas (dp)"
    if [key.name for key, _, _ in pairs] == ["embed.weight"] and layout["pp"] > 1:
        over = "pipeline stages that share the weight (pp)"
    if max(share, default=1.0) < 1.5:
        return (
            f"missing reduction over the {over}",
            f"norm {share[0]:.3g} times in {name}, no constant factor; {counted}",
        )
    return "wrong reduction", f"norm {share[0]:.3g} times in {name}, no constant factor; {counted}"


def permuted_experts(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    """Which experts of one tensor stand in each other's place, as ``0 is 3``; empty if that does not explain it.

    ``rows`` has all of them, in order.
    """
    places = []
    for expert, (one, other) in enumerate(rows):
        if np.array_equal(one, other):
            continue
        origin = next((there for there, (each, _) in enumerate(rows) if np.array_equal(each, other)), None)
        if origin is None:
            return ""
        places.append(f"{expert} is {origin}")
    return ", ".join(places)


def rms(row: np.ndarray) -> float:
    """Root mean square of what the row is of."""
    return math.sqrt(row[SQUARE] / row[COUNT]) if row[COUNT] else 0.0
