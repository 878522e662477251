"""Two long runs side by side, by what their metrics.jsonl recorded: losses and gradient norms.

The bounds are those that the vendor of TeleChat3's hardware publishes for moving a training to other hardware: first
loss within 0.5 % or 0.005, mean loss within 1 % or 0.01, global gradient norm within 10 % on average.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

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
    """One thing that was looked at; ``good`` is None for what is told and not judged."""

    of: str
    what: str
    found: str
    allowed: str = ""
    good: Optional[bool] = None

    @property
    def mark(self) -> str:
        return "" if self.good is None else "same" if self.good else "different"


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
    failed = [check for check in checks if check.good is False]
    judged = sum(check.good is not None for check in checks)
    rows = [(check.of, check.what, check.found, check.allowed) for check in checks]
    table = Table("Checks", ("figure", "check", "found", "allowed"), rows, [check.mark for check in checks])
    about = {
        "A": _describe(a),
        "B": _describe(b),
        "compared": f"{len(steps)} steps, {steps[0]} to {steps[-1]}",
        "bounds": (
            f"first loss {bounds.first_relative:.3g} relative or {bounds.first_absolute:.3g} absolute, mean loss "
            f"{bounds.mean_relative:.3g} or {bounds.mean_absolute:.3g}, gradient norm {bounds.norm_relative:.3g}"
        ),
    }
    first = f"{failed[0].of}: {failed[0].what}: {failed[0].found}; allowed: {failed[0].allowed}" if failed else ""
    summary = first or f"all {judged} checks hold over {len(steps)} steps"
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
    found, allowed = "; ".join(lacking) or "the same", "any" if common else "the same in both"
    return _Check("steps", "recorded", found, allowed, common or not lacking)


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
    found = f"in one run only at {_some(alone)}" if alone else f"at {number.sum()} steps"
    checks = [_Check(name, "a finite number", found, "in both runs or in none", not alone)]
    one, other, at = one[number], other[number], at[number]
    if not len(at):
        return checks
    apart = other - one
    relative = np.abs(apart) / np.maximum(np.abs(one), np.finfo(np.float64).tiny)  # of 0 to 0 it is 0
    unequal = np.flatnonzero(apart)
    first = f"step {int(at[unequal[0]])}, by {relative[unequal[0]]:.2e} of it" if len(unequal) else "none"
    checks.append(_Check(name, "first unequal value", first))
    if name == NORM:
        mean, most = float(relative.mean()), bounds.norm_relative
        return [*checks, _Check(name, "mean relative difference", f"{mean:.3%}", f"{most:.3%}", mean <= most)]
    allowed = bounds.first_absolute, bounds.first_relative
    checks.append(_apart(name, f"first loss (step {int(at[0])})", abs(apart[0]), relative[0], *allowed))
    allowed = bounds.mean_absolute, bounds.mean_relative
    checks.append(_apart(name, "mean difference", np.abs(apart).mean(), relative.mean(), *allowed))
    checks.append(_Check(name, "mean of B minus mean of A", f"{apart.mean():+.2e}"))
    return [*checks, *_shape(name, at, one, apart, relative, bounds)]


def _apart(name: str, what: str, absolute: float, relative: float, at_most: float, part_at_most: float) -> _Check:
    """Either bound is enough."""
    allowed = f"{at_most:.3g}, or {part_at_most:.3%} of it"
    return _Check(
        name, what, f"{absolute:.2e} ({relative:.3%})", allowed, bool(absolute <= at_most or relative <= part_at_most)
    )


def _shape(name: str, at: Values, one: Values, apart: Values, relative: Values, bounds: Bounds) -> list[_Check]:
    """Spikes and drift, where they are more than the bounds of the mean."""
    kinds = "spikes of the difference", "drift of the difference over the run"
    if len(at) < FEWEST:
        return [_Check(name, kind, f"not looked for in fewer than {FEWEST} steps") for kind in kinds]
    over = (np.abs(apart) > bounds.mean_absolute) & (relative > bounds.mean_relative)
    spikes = [int(step) for step in at[outliers(apart) & over]]
    moved, certain = drift(at, apart)
    part = abs(moved) / float(np.abs(one).mean()) if moved else 0.0
    drifts = certain and abs(moved) > bounds.mean_absolute and part > bounds.mean_relative
    found = f"{moved:+.2e} ({part:.3%}), {'a trend' if certain else 'no more than chance'}"
    allowed = f"none of more than {bounds.mean_absolute:.3g} and {bounds.mean_relative:.3%}"
    return [
        _Check(name, kinds[0], _some(spikes) if spikes else "none", allowed, not spikes),
        _Check(name, kinds[1], found, allowed, not drifts),
    ]


def _pictures(name: str, a: _Run, b: _Run, steps: list[int]) -> list[Section]:
    one, other = _figures(name, a, steps), _figures(name, b, steps)
    curves = {"A": list(zip(steps, one.tolist(), strict=True)), "B": list(zip(steps, other.tolist(), strict=True))}
    apart = list(zip(steps, (other - one).tolist(), strict=True))
    return [
        Lines(name, curves, y=name),
        Lines(f"{name}: B minus A", {"difference": apart}, y="difference"),
    ]
