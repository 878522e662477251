"""How far two correct runs may be from each other."""

from __future__ import annotations

from statistics import median

from trainer.verify.readings import Key
from trainer.verify.trace import Trace

FACTOR = 10.0  # on a measured noise floor: one pass measures one draw of the noise

# Relative distances (distance.py) that no fault is needed for, in fp32. In the first step they are more than twenty
# times the largest of 66 pairs of layouts (tests/verify/test_pairs.py), and eight times what other vector units made of
# the golden trace. Adam divides a gradient by its own size, so that an element whose gradient is all rounding takes a
# full step either way: hence the update's.
_FP32 = {
    "forward": 1e-5,
    "loss": 1e-5,
    "total": 1e-5,
    "contribution": 3e-5,
    "gradient": 3e-5,
    "exp_avg": 3e-5,
    "exp_avg_sq": 6e-5,
    "update": 5e-3,
}
_WEIGHT = 1e-6  # CPUs with other vector units draw normal numbers with other last bits
_BF16 = 1600.0  # times as much in bf16: those of the forward are then eight roundings, 2^-9 each
_MOST = 0.5  # a tolerance above this would say nothing
_LATER = 10.0  # after the first update: weights that differ by rounding, and what a step makes of that
_MARGIN = 2e-6  # of scores in fp32, which lie between 0 and 1

# Published for runs on different hardware (docs/verify.md): whatever was measured, more than this is a difference.
FIRST_LOSS, MEAN_LOSS, MEAN_NORM = 0.005, 0.01, 0.1


class Tolerance:
    """Of two traces: the larger of either's noise floor, times FACTOR, and what correct runs are known to need."""

    def __init__(self, one: Trace, other: Trace) -> None:
        self._floors = [trace.floor for trace in (one, other)]
        self._typical: dict[tuple[int, str], float] = {}
        for floor in self._floors:
            by_kind: dict[tuple[int, str], list[float]] = {}
            for key, value in floor.items():
                by_kind.setdefault((key.step, key.kind), []).append(value)
            for kind, values in by_kind.items():
                self._typical[kind] = max(self._typical.get(kind, 0.0), median(values))
        low = "bf16" in (one.header.config["train.precision"], other.header.config["train.precision"])
        self._coarse = _BF16 if low else 1.0
        measured = [trace.header.margin_floor or 0.0 for trace in (one, other)]
        self.margin = max(_MARGIN * self._coarse, FACTOR * max(measured))

    def of(self, key: Key) -> float:
        """The largest distance of this reading that is no difference."""
        if key.kind == "weight":
            return _WEIGHT
        base = _FP32[key.kind] * self._coarse * (_LATER if key.step > 1 else 1.0)
        first = key._replace(run="train")  # the noise was measured there
        floor = max([self._typical.get((key.step, key.kind), 0.0), *(each.get(first, 0.0) for each in self._floors)])
        found = min(max(base, FACTOR * floor), _MOST)
        if key.kind == "total":
            found = min(found, MEAN_NORM if key.name == "grad_norm" else FIRST_LOSS)
        return found
