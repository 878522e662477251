"""Two long runs side by side, by what their metrics.jsonl recorded: losses and gradient norms.

The bounds are those that the vendor of TeleChat3's hardware publishes for moving a training to other hardware: first
loss within 0.5 % or 0.005, mean loss within 1 % or 0.01, global gradient norm within 10 % on average.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.errors import UserError
from trainer.metrics.jsonl import FILE_NAME, read
from trainer.verify.report import Lines, Report, Section, Table
from trainer.verify.series import FEWEST, Values, drift, outliers

LOSSES = ("loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss")
NORM = "grad_norm"


@dataclass(frozen=True)
class Bounds:
    """The largest differences that pass. Of a loss either the relative or the absolute one has to hold."""

    first_relative: float = 0.005
    first_absolute: float = 0.005
    mean_relative: float = 0.01
    mean_absolute: float = 0.01
    norm_relative: float = 0.1


@dataclass(frozen=True)
class _Check:
    of: str
    what: str
    found: str
    bound: str
    good: bool

    def sentence(self) -> str:
        return f"{self.of}: {self.what} {self.found}, where the bound is {self.bound}"


@dataclass(frozen=True)
class _Run:
    """The training records of a run by step; of a step that was recorded again, the last one."""

    path: Path
    records: dict[int, dict[str, Any]]
    repeated: int


def compare(reference: str, other: str, bounds: Bounds | None = None, common: bool = False) -> Report:
    """Compare run B with run A, which is right.

    Args:
        reference, other: run directories, or files such as their metrics.jsonl.
        common: compare the steps that both have recorded; else having others is a difference, too.

    Raises:
        UserError: a file is missing, is no metrics file, or no step is in both.
    """
    bounds = bounds or Bounds()
    a, b = _read(reference), _read(other)
    steps = sorted(a.records.keys() & b.records.keys())
    if not steps:
        raise UserError(f"{b.path}: has no step that {a.path} has; give two runs that recorded the same steps")
    checks = [_check_steps(a, b, common)]
    names = [name for name in (*LOSSES, NORM) if any(name in run.records[steps[0]] for run in (a, b))]
    for name in names:
        checks += _check_figure(name, a, b, steps, bounds)
    failed = [check for check in checks if not check.good]
    rows = [(check.of, check.what, check.found, check.bound) for check in checks]
    marks = ["same" if check.good else "different" for check in checks]
    table = Table("Checks", ("figure", "check", "found", "bound"), rows, marks)
    about = {
        "A": _describe(a),
        "B": _describe(b),
        "compared": f"{len(steps)} steps, {steps[0]} to {steps[-1]}",
        "bounds": (
            f"first loss {bounds.first_relative:.3g} relative or {bounds.first_absolute:.3g} absolute, mean loss "
            f"{bounds.mean_relative:.3g} or {bounds.mean_absolute:.3g}, gradient norm {bounds.norm_relative:.3g}"
        ),
    }
    summary = failed[0].sentence() if failed else f"all {len(checks)} checks hold over {len(steps)} steps"
    sections = [*(picture for name in names for picture in _pictures(name, a, b, steps)), table]
    verdict = "different" if failed else "same"
    return Report("Two runs", verdict, f"{summary}.", sections, about)  # type: ignore[arg-type]


def _read(place: str) -> _Run:
    path = Path(place, FILE_NAME) if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give the directory of a run that has started")
    try:
        records = [record for record in read(path) if isinstance(record, dict)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a run's {FILE_NAME}") from error
    trained = [record for record in records if isinstance(record.get("step"), int) and "loss" in record]
    if not trained:
        raise UserError(f"{path}: holds no training steps; give a run's {FILE_NAME}, after its first step")
    wrong = next((record for record in trained for name in (*LOSSES, NORM) if not _is_figure(record.get(name))), None)
    if wrong is not None:
        raise UserError(f"{path}: step {wrong['step']}: has figures that are no numbers; give a run's own {FILE_NAME}")
    counts = Counter(record["step"] for record in trained)
    repeated = sum(count - 1 for count in counts.values())
    return _Run(path, {record["step"]: record for record in trained}, repeated)


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _describe(run: _Run) -> str:
    again = f", {run.repeated} recorded again after a resume" if run.repeated else ""
    return f"{run.path} ({len(run.records)} steps{again})"


def _check_steps(a: _Run, b: _Run, common: bool) -> _Check:
    only_a, only_b = sorted(a.records.keys() - b.records.keys()), sorted(b.records.keys() - a.records.keys())
    lacking = [f"{name} lacks {_some(steps)}" for name, steps in (("B", only_a), ("A", only_b)) if steps]
    bound = "any" if common else "the same steps in both"
    return _Check("steps", "recorded", "; ".join(lacking) or "the same", bound, common or not lacking)


def _some(steps: list[int]) -> str:
    """ "step 3", or "7 steps, first 3"."""
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, first {steps[0]}"


def _figures(name: str, run: _Run, steps: list[int]) -> Values:
    """One value a step, NaN where the record has none."""
    found = (run.records[step].get(name) for step in steps)
    return np.array([math.nan if value is None else value for value in found])


def _check_figure(name: str, a: _Run, b: _Run, steps: list[int], bounds: Bounds) -> list[_Check]:
    one, other, at = _figures(name, a, steps), _figures(name, b, steps), np.array(steps, dtype=float)
    number = np.isfinite(one) & np.isfinite(other)
    alone = [int(step) for step in at[np.isfinite(one) != np.isfinite(other)]]
    checks = [
        _Check(name, "a number", f"in one run only at {_some(alone)}" if alone else "in both", "in both", not alone)
    ]
    one, other, at = one[number], other[number], at[number]
    if not len(at):
        return checks
    apart = other - one
    relative = np.abs(apart) / np.maximum(np.abs(one), np.finfo(np.float64).tiny)
    relative[apart == 0] = 0
    unequal = at[apart != 0]
    first = f"step {int(unequal[0])}, by {relative[apart != 0][0]:.2e}" if len(unequal) else "none"
    checks.append(_Check(name, "first unequal value", first, "for information", True))
    if name == NORM:
        return [*checks, _norm(name, float(relative.mean()), bounds)]
    mean = float(np.abs(apart).mean()), float(relative.mean())
    checks += [
        _loss(
            name,
            f"first loss, step {int(at[0])}, apart by",
            float(abs(apart[0])),
            float(relative[0]),
            bounds.first_absolute,
            bounds.first_relative,
        ),
        _loss(name, "mean loss apart by", *mean, bounds.mean_absolute, bounds.mean_relative),
        _Check(name, "mean of B minus mean of A", f"{apart.mean():+.2e}", "for information", True),
    ]
    return [*checks, *_shape(name, at, one, apart, relative, bounds)]


def _loss(name: str, what: str, absolute: float, relative: float, at_most: float, at_most_relative: float) -> _Check:
    found, bound = f"{absolute:.2e} ({relative:.3%})", f"{at_most:.3g} or {at_most_relative:.3g} of it"
    return _Check(name, what, found, bound, absolute <= at_most or relative <= at_most_relative)


def _norm(name: str, relative: float, bounds: Bounds) -> _Check:
    good = relative <= bounds.norm_relative
    return _Check(name, "mean relative difference", f"{relative:.3%}", f"{bounds.norm_relative:.3%}", good)


def _shape(name: str, at: Values, one: Values, apart: Values, relative: Values, bounds: Bounds) -> list[_Check]:
    """Spikes and drift, where they are more than the bounds of the mean."""
    if len(at) < FEWEST:
        few = f"not looked for below {FEWEST} steps"
        return [_Check(name, what, few, "none", True) for what in ("spikes", "drift")]
    over = (np.abs(apart) > bounds.mean_absolute) & (relative > bounds.mean_relative)
    spikes = [int(step) for step in at[outliers(apart) & over]]
    moved, certain = drift(at, apart)
    part = abs(moved) / float(np.abs(one).mean())
    drifts = certain and abs(moved) > bounds.mean_absolute and part > bounds.mean_relative
    trend = "a trend" if certain else "no more than chance"
    bound = "none beyond the mean's bounds"
    return [
        _Check(name, "spikes of the difference", _some(spikes) if spikes else "none", bound, not spikes),
        _Check(name, "drift of the difference over the run", f"{moved:+.2e} ({part:.3%}), {trend}", bound, not drifts),
    ]


def _pictures(name: str, a: _Run, b: _Run, steps: list[int]) -> list[Section]:
    one, other = _figures(name, a, steps), _figures(name, b, steps)
    curves = {"A": list(zip(steps, one.tolist(), strict=True)), "B": list(zip(steps, other.tolist(), strict=True))}
    apart = list(zip(steps, (other - one).tolist(), strict=True))
    return [
        Lines(name, curves, y=name),
        Lines(f"{name}: B minus A", {"difference": apart}, y="difference"),
    ]
