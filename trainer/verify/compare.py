"""Two traces, phase by phase in the order of a step: the first place where they differ, and what that is likely to be.

The order is what makes a name mean something. Within a phase everything before it was equal: the data before weights,
the modules in the order of the forward pass, gradients in that of the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from backends.errors import UserError
from trainer.verify import classify
from trainer.verify.distance import distance
from trainer.verify.findings import (
    BACKWARD,
    DATA,
    FORWARD,
    INITIAL,
    STILL,
    TRAJECTORY,
    UPDATE,
    Comparison,
    Finding,
    Measured,
    Phase,
)
from trainer.verify.places import backward_order, forward_place
from trainer.verify.readings import Key
from trainer.verify.sums import COUNT, SUM
from trainer.verify.tolerance import FIRST_LOSS, MEAN_LOSS, MEAN_NORM, Tolerance
from trainer.verify.trace import Trace, load
from trainer.verify.updates import of_bias, of_update

_LOSSES = ("lm_loss", "mtp_loss", "aux_loss", "z_loss", "loss")


def compare(one: Path, other: Path) -> Comparison:
    """Compare the traces in two folders; ``one`` is the reference.

    Raises:
        UserError: one of them cannot be read, or they are of different models.
    """
    return _Pair(load(one), load(other), one, other).compared()


class _Pair:
    """Two traces under comparison."""

    def __init__(self, one: Trace, other: Trace, first: Path, second: Path) -> None:
        self.one, self.other, self.names = one, other, (str(first), str(second))
        shapes = [
            {key.name: trace.rows[key][COUNT] for key in trace.keys("train", 0, "weight")} for trace in (one, other)
        ]
        apart = sorted(dict(shapes[0].items() ^ shapes[1].items()))
        if apart:
            raise UserError(
                f"{second}: is of another model than {first}: {apart[0]} has another shape or is missing; compare "
                "traces of one model"
            )
        self.tolerance = Tolerance(one, other)
        self.steps = range(1, min(one.header.steps, other.header.steps) + 1)
        self.layout = other.header.layout
        self.loose: set[str] = set()  # runs in which a tie fell the other way
        self.other_gradients: set[tuple[str, int]] = set()  # run and step
        self.measured: list[Measured] = []
        self.ties = 0

    def compared(self) -> Comparison:
        """All phases."""
        later = self.steps[1:]
        phases = [
            self._phase(DATA, [(self._data, "train", step) for step in self.steps]),
            self._phase(INITIAL, [(self._weights, "train", 0)]),
            self._phase(FORWARD, [(self._forward, "train", 1)]),
            self._phase(BACKWARD, [(self._backward, "train", 1)]),
            self._phase(UPDATE, [(self._update, "train", 1)]),
            self._phase(STILL, [(look, "still", step) for step in self.steps for look in self._whole_step]),
            self._phase(TRAJECTORY, [(look, "train", step) for step in later for look in self._whole_step]),
        ]
        phases[-1] = self._with_published_bounds(phases[-1])
        configs = self.one.header.config, self.other.header.config
        # A key that one of them lacks came with a later version; its default is what the earlier one did.
        differing = {key: (configs[0][key], configs[1][key]) for key in sorted(configs[0].keys() & configs[1].keys())}
        return Comparison(
            *self.names,
            phases,
            {key: values for key, values in differing.items() if values[0] != values[1]},
            bool(self.one.floor or self.other.floor),
        )

    @property
    def _whole_step(self) -> tuple:
        return self._data, self._forward, self._backward, self._update

    def _phase(self, name: str, looks: Iterable[tuple]) -> Phase:
        """Look at one thing after the other, up to the first difference."""
        self.measured, self.ties = [], 0
        finding = None
        loose = False
        for look, run, step in looks:
            found = look(run, step)
            if found is not None and look == self._backward:
                self.other_gradients.add((run, step))
            loose = loose or run in self.loose
            if found is not None:
                finding = Finding(name, run, step, *found)
                break
        return Phase(name, self.measured, finding, self.ties, loose)

    def _measure(self, keys: Iterable[Key]) -> list[Measured]:
        """The readings, in this order; the caller looks at those that differ."""
        found = []
        for key in keys:
            one, other = self.one.rows.get(key), self.other.rows.get(key)
            apart = np.inf if one is None or other is None else distance(one, other, key.kind)
            found.append(Measured(key, float(apart), self.tolerance.of(key)))
        self.measured += found
        return found

    def _rows(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        return self.one.rows[key], self.other.rows[key]

    def _disagreement(self, run: str, step: int, *kinds: str) -> tuple[str, str, str] | None:
        """Ranks of one trace that do not have what the others have."""
        for trace, which in ((self.one, "first"), (self.other, "second")):
            for key, ranks in trace.header.disagreements:
                if (key.run, key.step) == (run, step) and key.kind in kinds:
                    likely = {
                        "data": "ranks read different data",
                        "replica": "stale or different weights" if step else "ranks start from different weights",
                        "bias": "ranks have different expert biases",
                        "load": "ranks count different loads",
                    }[key.kind]
                    of = f"sequence {key.name}" if key.kind == "data" else key.name
                    who = f"rank {', '.join(map(str, ranks))} of the {which} trace has other values than the others"
                    return of, likely, who
        return None

    def _data(self, run: str, step: int) -> tuple[str, str, str] | None:
        found = self._disagreement(run, step, "data")
        if found:
            return found
        key = Key(run, step, "data", "sequences")
        one, other = self.one.arrays[key], self.other.arrays[key]
        if one.shape != other.shape:
            return "global batch", "other data", f"{len(other)} sequences instead of {len(one)}"
        differing = np.flatnonzero((one != other).any(1))
        self.measured.append(Measured(key, float(len(differing)), 0.5))
        if not len(differing):
            return None
        count = f"{len(differing)} of {len(one)} sequences differ"
        place = f"sequence {differing[0]}"
        if sorted(map(tuple, one)) == sorted(map(tuple, other)):
            return place, "data order", f"{count}, and are the same ones in another order"
        fields = [
            name for index, name in enumerate(("tokens", "labels", "positions")) if (one != other)[:, index].any()
        ]
        if fields == ["labels"]:
            return place, "labels", f"{count}, in their labels only"
        if fields == ["positions"]:
            return place, "positions or document boundaries", f"{count}, in these only"
        return place, "other data", f"{count}, in their {' and '.join(fields)}"

    def _weights(self, run: str, step: int) -> tuple[str, str, str] | None:
        keys = [Key(run, step, "weight", name) for name in self._parameter_names("weight", run, step)]
        found = [each.key for each in self._measure(keys) if each.differs]
        disagreement = self._disagreement(run, step, "replica", "bias")
        if not found:
            return disagreement
        first, (one, other) = found[0], self._rows(found[0])
        count = f"{len(found)} of {len(keys)} tensors differ"
        stacked = first.name.partition("[")[0]
        if stacked != first.name:
            experts = [key for key in keys if key.name.startswith(f"{stacked}[")]
            swapped = classify.permuted_experts([self._rows(key) for key in experts])
            if swapped:
                return stacked, "swapped experts", f"expert {swapped}; {count}"
        if disagreement:
            return first.name, disagreement[1], f"{count}; {disagreement[2]}"
        near = classify.relation(one, other)
        alike = abs(classify.rms(other) / (classify.rms(one) or 1) - 1) < 0.2
        if alike and near.rest > 0.5:
            return first.name, "initialisation: another seed", f"{count}; same size, other values"
        return first.name, "initialisation", f"{count}; {classify.of_rows(one, other, self.layout)[1]}"

    def _forward(self, run: str, step: int) -> tuple[str, str, str] | None:
        loss_names = [name for name in _LOSSES if Key(run, step, "total", name) in self.one.rows]
        totals = [Key(run, step, "total", name) for name in loss_names]
        if run not in self.loose:
            found = self._modules(run, step)
            if found:
                return found
        first = next((each.key for each in self._measure(totals) if each.differs), None)
        if first is None:
            return None
        if first not in self.other.rows:
            return first.name, "missing", "the second trace does not have it"
        one, other = self._rows(first)
        place = {"lm_loss": "head", "mtp_loss": "mtp", "loss": "loss"}.get(first.name, first.name)
        kind, evidence = classify.of_rows(one, other, self.layout)
        if kind == "scaling" and classify.multiple(other[SUM] / one[SUM]):
            return place, f"{first.name} is scaled", evidence
        values = f"{first.name} {other[SUM]:.7g} instead of {one[SUM]:.7g}"
        return place, "labels, or what the loss is divided by", f"{values}; every module gave the same before"

    def _modules(self, run: str, step: int) -> tuple[str, str, str] | None:
        """Up to the first that gave something else; up to the first tie that fell the other way."""
        last = ""
        for name in self.one.header.order:
            choice = self._choices(run, step, name)
            if choice is not None:
                return choice
            if run in self.loose:
                return None
            keys = [Key(run, step, kind, name) for kind in ("forward", "loss")]
            for each in self._measure(key for key in keys if key in self.one.rows):
                if each.differs:
                    kind, evidence = self._evidence(each.key)
                    place, what = forward_place(name, last)
                    what = self._forward_class(each.key, kind) or what
                    return place, what, f"{evidence}; first seen in {name}, equal up to {last or 'the tokens'}"
            last = name
        return None

    def _forward_class(self, key: Key, kind: str) -> str:
        """What the numbers say for certain; empty where the place says more."""
        if kind == "not finite" or (kind == "precision" and classify.in_bf16(self.other.rows[key])):
            return kind
        if key.kind == "loss" and kind == "scaling":
            one, other = self._rows(key)
            return "the loss is scaled" if classify.multiple(other[SUM] / one[SUM]) else ""
        return ""

    def _evidence(self, key: Key) -> tuple[str, str]:
        if key not in self.other.rows:
            return "missing", "the second trace does not have it"
        return classify.of_rows(*self._rows(key), self.layout)

    def _choices(self, run: str, step: int, name: str) -> tuple[str, str, str] | None:
        """A router's choices: equal, or other by more than a tie."""
        key = Key(run, step, "experts", name)
        if key not in self.one.arrays:
            return None
        one, other = self.one.arrays[key], self.other.arrays[key]
        if one.shape != other.shape:
            return name, "routing", f"choices {other.shape} instead of {one.shape}"
        flipped = np.flatnonzero((one != other).any(1))
        margin_key = key._replace(kind="margin")
        lead = np.minimum(self.one.arrays[margin_key], self.other.arrays[margin_key])[flipped]
        worst = float(lead.max(initial=0.0))
        self.measured.append(Measured(key, worst, self.tolerance.margin))
        if not len(flipped):
            return None
        if worst <= self.tolerance.margin:
            self.ties += len(flipped)
            self.loose.add(run)
            return None
        wrong = flipped[~(lead <= self.tolerance.margin)]  # NaN too
        changed = sum(len(set(one[token]) - set(other[token])) for token in flipped)
        evidence = (
            f"{len(flipped)} of {len(one)} tokens chose other experts ({changed} choices), token {wrong[0]} first; "
            f"margins up to {worst:.2g}, where rounding moves them by {self.tolerance.margin:.0e} at most"
        )
        if worst < classify.BF16:
            return name, "routing flips of the size of bf16: precision of the scores", evidence
        return name, "routing flip, not by a tie", evidence

    def _backward(self, run: str, step: int) -> tuple[str, str, str] | None:
        if run in self.loose:
            return None
        both = [
            key
            for key in self.one.keys(run, step, "contribution")
            if key in self.other.rows  # ZeRO-2 has none
        ]
        order = backward_order(self.one.header.parameters)
        contributions = self._measure(sorted(both, key=order))
        differing = [each.key for each in contributions if each.differs]
        if differing:
            kind, evidence = classify.of_rows(*self._rows(differing[0]), self.layout)
            experts = all(".experts." in key.name for key in differing)
            count = f"{len(differing)} of {len(both)} gradients differ{', all of experts' if experts else ''}"
            return differing[0].name, f"gradient: {kind}", f"{evidence}; {count}, before any reduction"
        keys = sorted(self.one.keys(run, step, "gradient"), key=order)
        differing = [each.key for each in self._measure(keys) if each.differs]
        if not differing:
            return None
        pairs = [(key, *self._rows(key)) for key in differing]
        if both:
            kind, evidence = classify.of_reduction(pairs, self.layout)
        else:
            kind, evidence = classify.of_rows(*pairs[0][1:], self.layout)
            kind, evidence = f"gradient: {kind}", f"{evidence}; {len(differing)} of {len(keys)} gradients differ"
        return differing[0].name, kind, evidence

    def _update(self, run: str, step: int) -> tuple[str, str, str] | None:
        totals = [Key(run, step, "total", name) for name in ("grad_norm", "lr")]
        for each in self._measure(totals):
            if each.differs and each.key.name == "grad_norm" and run not in self.loose:
                one, other = self._rows(each.key)
                values = f"{other[SUM]:.6g} instead of {one[SUM]:.6g}"
                if (run, step) in self.other_gradients:
                    return "gradient norm", "of other gradients", values
                return "gradient norm", "norm of a part of the gradients", f"{values}, from the same gradients"
            if each.differs and each.key.name == "lr":
                was, rate = (float(row[SUM]) for row in self._rows(each.key))
                return "learning rate", "learning-rate schedule", f"{rate:.6g} instead of {was:.6g}"
        if run in self.loose:
            return self._disagreement(run, step, "replica", "bias", "load")
        for kind in ("exp_avg", "exp_avg_sq", "update"):
            keys = [Key(run, step, kind, name) for name in self._parameter_names(kind, run, step)]
            differing = [each.key for each in self._measure(keys) if each.differs]
            if differing:
                likely, evidence = of_update(self.one, self.other, differing, len(keys))
                return differing[0].name, likely, evidence
        return self._disagreement(run, step, "replica", "bias", "load") or self._biases(run, step)

    def _biases(self, run: str, step: int) -> tuple[str, str, str] | None:
        for kind in ("load", "bias"):
            for key in [key for key in self.one.arrays if key[:3] == (run, step, kind)]:
                one, other = self.one.arrays[key], self.other.arrays.get(key)
                same = other is not None and np.array_equal(one, other)
                self.measured.append(Measured(key, 0.0 if same else np.inf, 0.5))
                if not same:
                    before = key._replace(step=step - 1)
                    return of_bias(key, one, other, self.one.arrays.get(before), self.other.arrays.get(before))
        return None

    def _parameter_names(self, kind: str, run: str, step: int) -> list[str]:
        """As the model defines them; each expert of a stacked one by itself."""
        order = {name: index for index, name in enumerate(self.one.header.parameters)}
        names = [key.name for key in self.one.keys(run, step, kind)]

        def place(name: str) -> tuple[int, int]:
            stacked, _, expert = name.partition("[")
            return order[stacked], int(expert[:-1]) if expert else 0

        return sorted(names, key=place)

    def _with_published_bounds(self, phase: Phase) -> Phase:
        """More than these is a difference, whatever the noise."""
        apart = {
            name: [self._relative(Key("train", step, "total", name)) for step in self.steps]
            for name in ("loss", "grad_norm")
        }
        first, mean = apart["loss"][0], sum(apart["loss"]) / len(self.steps)
        norm = sum(apart["grad_norm"]) / len(self.steps)
        bounds = (("first loss", first, FIRST_LOSS), ("mean loss", mean, MEAN_LOSS), ("mean norm", norm, MEAN_NORM))
        measured = [Measured(Key("train", 0, "published", name), value, bound) for name, value, bound in bounds]
        beyond = next((each for each in measured if each.differs), None)
        finding = phase.finding
        if finding is None and beyond is not None:
            evidence = f"{beyond.distance:.2%} apart, more than {beyond.tolerance:.1%}"
            finding = Finding(TRAJECTORY, "train", 0, beyond.key.name, "beyond the published threshold", evidence)
        return Phase(phase.name, [*phase.measured, *measured], finding, phase.ties, phase.loose)

    def _relative(self, key: Key) -> float:
        one, other = (float(row[SUM]) for row in self._rows(key))
        return abs(other - one) / abs(one) if one else abs(other)
