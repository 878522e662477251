"""What kind of fault makes an update differ although the gradients are the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.verify.classify import relation, times
from trainer.verify.distance import size_of
from trainer.verify.readings import Key
from trainer.verify.sums import SKETCH
from trainer.verify.trace import Trace

_CONSTANT = 1e-3  # relative spread below which ratios are one number


def of_update(one: Trace, other: Trace, differing: Sequence[Key], compared: int) -> tuple[str, str]:
    """Class and evidence of moments or weights' changes that differ, all of one kind."""
    kind, first = differing[0].kind, differing[0]
    found = [relation(one.rows[key], other.rows[key]) for key in differing]
    ratios = [each.ratio for each in found]
    count = f"{len(differing)} of {compared} differ"
    pure = all(each.rest < _CONSTANT for each in found)
    names = {"exp_avg": "first moment", "exp_avg_sq": "second moment", "update": "change of the weights"}
    if pure and kind == "exp_avg":
        spread = max(ratios) - min(ratios)
        if spread < _CONSTANT and len(differing) == compared:
            return "clipping: one factor for all", f"first moments {ratios[0]:.5g} times the first; {count}"
        low, high = min(ratios), max(ratios)
        return "clipping: another factor in parts of the model", f"first moments {low:.5g} to {high:.5g} times; {count}"
    if not size_of(other.rows[first], kind):
        return f"no {names[kind]}", f"exactly 0 in the second trace; {count}"
    if pure and max(ratios) - min(ratios) < _CONSTANT and len(differing) == compared:
        what = "learning rate" if kind == "update" else names[kind]
        return f"{what}: one factor for all", f"{times(ratios[0], other.header.layout)} the first; {count}"
    if kind == "update":
        decay = _decay(one, other, first)
        if decay is not None:
            return "weight decay", f"the difference is {decay:.3g} times the weights; {count}"
    return f"wrong {names[kind]}", f"{found[0].rest:.1e} apart, {ratios[0]:.5g} times; {count}"


def _decay(one: Trace, other: Trace, key: Key) -> float | None:
    """The factor, if the difference of the first changes of a weight is a multiple of the weight."""
    weight = one.rows.get(Key("train", 0, "weight", key.name))
    if weight is None or key.step != 1:
        return None
    found = relation(weight, other.rows[key] - one.rows[key])
    return found.ratio if found.rest < 0.05 and weight[SKETCH].any() else None


def of_bias(
    key: Key, one: np.ndarray, other: np.ndarray | None, before: np.ndarray | None, other_before: np.ndarray | None
) -> tuple[str, str, str]:
    """Place, class and evidence of an expert bias, or of tokens per expert, that differs."""
    if other is None:
        return key.name, "missing", "the second trace does not have it"
    count = f"{int((one != other).sum())} of {one.size} experts differ"
    if key.kind == "load":
        return f"layer {key.name}", "tokens per expert", f"{count}; {other.sum()} choices instead of {one.sum()}"
    if before is not None and other_before is not None:
        moved, other_moved = one - before, other - other_before
        steps = other_moved[moved != 0] / moved[moved != 0]
        if np.isfinite(steps).all() and steps.size and not np.allclose(np.abs(steps), 1, rtol=1e-3):
            return key.name, "expert bias: moved by another amount", f"{np.abs(steps).max():.3g} times at most; {count}"
        return key.name, "expert bias: moved another way", f"{count}, by the same tokens per expert"
    return key.name, "expert bias", count
