"""A comparison of traces as a report."""

from __future__ import annotations

import math

from trainer.verify.findings import Comparison
from trainer.verify.readings import Key
from trainer.verify.report import Heatmap, Report, Table
from trainer.verify.tolerance import FACTOR


def report(found: Comparison) -> Report:
    """A line for each phase, a map of the distances by part of the model, and the evidence of every difference."""
    return Report(
        title="Traces",
        verdict="same" if found.same else "different",
        summary=_summary(found),
        sections=[_map(found), _phases(found), *([_differences(found)] if not found.same else [])],
        about={
            "reference": found.one,
            "compared with it": found.other,
            "tolerances": f"{FACTOR:g} times the measured noise, at least the built-in ones"
            if found.measured_floor
            else "built in; no trace has a noise floor",
            "different keys": ", ".join(f"{key}: {one} and {other}" for key, (one, other) in found.differing.items())
            or "none",
        },
    )


def _summary(found: Comparison) -> str:
    ties = sum(phase.ties for phase in found.phases)
    tied = f"; {ties} choices of experts fell the other way by ties within rounding" if ties else ""
    if found.first is not None:
        return f"First difference: {found.first}{tied}."
    count = sum(len(phase.measured) for phase in found.phases)
    return f"All phases agree: {count:,} readings within rounding{tied}."


def _phases(found: Comparison) -> Table:
    rows: list[list[str | int | float | None]] = []
    for phase in found.phases:
        worst = phase.worst
        rows.append(
            [
                phase.name,
                len(phase.measured),
                f"{worst.key.kind} {worst.key.name}" if worst else "",
                worst.distance if worst else None,
                worst.tolerance if worst else None,
                phase.ties,
            ]
        )
    return Table(
        "Phases",
        ["phase", "readings", "largest for its tolerance", "distance", "tolerance", "ties"],
        rows,
        ["different" if phase.finding else "same" for phase in found.phases],
        "Each phase stops at its first difference; what comes after it usually differs as a consequence."
        + (" After a tie only the published thresholds hold." if any(phase.loose for phase in found.phases) else ""),
    )


def _differences(found: Comparison) -> Table:
    findings = [phase.finding for phase in found.phases if phase.finding]
    rows: list[list[str | int]] = [[each.phase, each.step, each.place, each.likely, each.evidence] for each in findings]
    return Table("Differences", ["phase", "step", "where", "likely", "evidence"], rows)


def _map(found: Comparison) -> Heatmap:
    """Distance over tolerance, the largest of each part of the model in each phase."""
    parts: dict[str, dict[str, float]] = {}
    for phase in found.phases:
        for each in phase.measured:
            shares = parts.setdefault(_part(each.key), {})
            shares[phase.name] = max(shares.get(phase.name, 0.0), each.share)
    columns = [phase.name for phase in found.phases]
    values = [
        [None if share is None or math.isinf(share) else share for share in map(shares.get, columns)]
        for shares in parts.values()
    ]
    return Heatmap(
        "Distance in units of the tolerance", list(parts), columns, values, bound=1.0, note="Above 1 is a difference."
    )


def _part(key: Key) -> str:
    """A layer, or whatever else a reading belongs to."""
    if key.kind in ("total", "published"):
        return "losses and norms"
    if key.kind in ("data", "load"):
        return {"data": "data", "load": "tokens per expert"}[key.kind]
    first, _, rest = key.name.partition(".")
    number = rest.partition(".")[0]
    return f"{first}.{number}" if number.isdigit() else first
