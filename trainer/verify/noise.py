"""The noise floor: how far a run is from itself when its sums are added up in another order."""

from __future__ import annotations

import numpy as np

from trainer.verify.distance import distance
from trainer.verify.trace import Trace

NOISE = "noise"


def reduce_noise(trace: Trace) -> None:
    """Put the distance between the runs ``noise`` and ``train`` in the place of what was read of ``noise``."""
    shifts = []
    for key in [key for key in trace.rows if key.run == NOISE]:
        first = key._replace(run="train")
        trace.floor[first] = distance(trace.rows[first], trace.rows.pop(key), key.kind)
    for key in [key for key in trace.arrays if key.run == NOISE]:
        value, first = trace.arrays.pop(key), key._replace(run="train")
        if key.kind == "margin":
            shifts.append(largest_shift(trace.arrays[first], value))
    if shifts:
        trace.header.margin_floor = max(shifts)


def largest_shift(one_T: np.ndarray, other_T: np.ndarray) -> float:
    """What margins differ by, at most; where both are infinite nothing was chosen."""
    chosen = np.isfinite(one_T) & np.isfinite(other_T)
    return float(np.abs(one_T - other_T)[chosen].max(initial=0.0))
