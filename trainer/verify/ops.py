"""Every operation that a config's model calls, at its own shapes and dtypes, against its definition in fp64.

What is compared, and what passes, is ``backends/accuracy.py``'s: an operation may err by so many times the error of
the plain torch formula in the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch

from backends.accuracy import FACTOR, Errors, Finding, measure
from backends.operations import ExpertOrder, Operations
from trainer.config.schema import Config
from trainer.precision import weights_dtype
from trainer.verify.captured import Call, OrderSpec, Spec, capture
from trainer.verify.inputs import DISTRIBUTIONS, inputs
from trainer.verify.report import Cell, Heatmap, Report, Section, Table

# Dimensions that may be shorter than the model's without another way to compute: by operation the parameters and the
# dimension of each. Experts, vocabulary, and outputs of a multiply are independent of each other.
_MAY_BE_CUT = {
    "linear": {"weight": 0, "bias": 0},
    "grouped_mm": {"weight_EOI": 0, "counts_E": 0},
    "add_expert_bias": {"bias_EO": 0, "counts_E": 0},
    "linear_cross_entropy": {"weight_VH": 0},
}


@dataclass(frozen=True)
class Checked:
    """A call and what was found, by distribution of its inputs.

    Attributes:
        call: as it was run.
        captured: as the model makes it, ``times`` times in a micro-batch.
        findings: empty where it was not run.
    """

    call: Call
    captured: Call
    times: int
    findings: Mapping[str, Sequence[Finding]]

    @property
    def skipped(self) -> bool:
        return not self.findings

    def failures(self) -> list[tuple[str, Finding]]:
        """Distribution and finding of all that is wrong."""
        return [(name, finding) for name, found in self.findings.items() for finding in found if not finding.passed]


def check(
    calls: Mapping[Call, int], ops: Operations, device: torch.device, compute: torch.dtype, most: int
) -> list[Checked]:
    """Run every call with every distribution.

    Args:
        calls: what :func:`trainer.verify.captured.capture` gives.
        compute: the dtype of the model's weights.
        most: elements of the largest tensor; calls with more are cut where they may be, else not run.
    """
    made = []
    for captured, times in calls.items():
        call = _cut(captured, most)
        small = max(_elements(call), default=0) <= most
        findings = {
            name: _measure(call, name, ops, device, compute) for name in DISTRIBUTIONS if small and _differs(call, name)
        }
        made.append(Checked(call, captured, times, findings))
    return made


def _differs(call: Call, distribution: str) -> bool:
    """Whether the distribution says anything: one is enough for a call without activations."""
    floats = any(isinstance(spec, Spec) and spec.dtype.is_floating_point for _, spec in call.arguments)
    return floats or distribution == next(iter(DISTRIBUTIONS))


def _measure(
    call: Call, distribution: str, ops: Operations, device: torch.device, compute: torch.dtype
) -> list[Finding]:
    """What is wrong by less than twice the bound is measured once more, with other numbers, and that counts.

    A largest error is a matter of chance, above all of sums over a few outliers, and plain torch may have been lucky.
    """

    def once(seed: int) -> list[Finding]:
        given = inputs(call, distribution, compute, seed)
        return measure(_run(call, list(given)), given, compute, ops, device)

    found = once(seed=0)
    close = [1 < finding.share <= 2 for finding in found]
    if not any(close):
        return found
    return [again if is_close else finding for finding, again, is_close in zip(found, once(seed=1), close, strict=True)]


def _run(call: Call, names: Sequence[str]) -> Callable[..., Any]:
    """The call as a function of the operations and its tensors."""

    def run(ops: Operations, *tensors: Any) -> Any:
        given = dict(zip(names, tensors, strict=True))
        arguments = {}
        for name, spec in call.arguments:
            if isinstance(spec, OrderSpec):
                arguments[name] = ExpertOrder(
                    *(given[f"{name}.{part}"] for part in ("order_P", "inverse_TK", "counts_E"))
                )
            else:
                arguments[name] = given.get(name, spec)
        return getattr(ops, call.operation)(**arguments)

    return run


def _elements(call: Call) -> list[int]:
    return [math.prod(spec.shape) for _, spec in call.arguments if isinstance(spec, Spec)]


def _cut(call: Call, most: int) -> Call:
    """The call with as much of the dimensions that may be cut as ``most`` elements a tensor leave."""
    dims = _MAY_BE_CUT.get(call.operation, {})
    specs = {name: spec for name, spec in call.arguments if name in dims and isinstance(spec, Spec)}
    largest = max(specs.values(), key=lambda spec: math.prod(spec.shape), default=None)
    if largest is None or math.prod(largest.shape) <= most:
        return call
    left = max(1, most // math.prod(largest.shape[1:]))
    arguments = []
    for name, value in call.arguments:
        if name in specs:
            shape = list(value.shape)
            shape[dims[name]] = left
            value = value._replace(shape=tuple(shape))
        arguments.append((name, value))
    return replace(call, arguments=tuple(arguments))


def verify(config: Config, where: str, ops: Operations, device: torch.device, tokens: int, most: int) -> Report:
    """Capture, check and report.

    Args:
        where: the config, for the report.
        tokens: of the micro-batch that is captured, at most.
        most: as :func:`check` takes it.
    """
    compute = weights_dtype(config.train.precision)
    found = check(capture(config, tokens), ops, device, compute, most)
    length = config.data.sequence_length
    shorter = f", {length} in the config" if tokens < length else ""
    about = {
        "config": where,
        "operations": f"{type(ops).__name__} on {device}",
        "dtype": str(compute).removeprefix("torch."),
        "tokens": f"at most {tokens} of a micro-batch{shorter}",
        "elements": f"at most {most:,} of a tensor",
        "passes": f"at most {FACTOR[compute]:g} times the error of plain torch in the same dtype, or a rounding",
    }
    return report(found, about)


def report(found: Sequence[Checked], about: Mapping[str, str]) -> Report:
    """One row for each call, and one for each thing that was measured."""
    ran = [checked for checked in found if not checked.skipped]
    failed = [checked for checked in ran if checked.failures()]
    operations = len({checked.call.operation for checked in ran})
    if failed:
        first = failed[0]
        distribution, finding = first.failures()[0]
        names = ", ".join(dict.fromkeys(checked.call.operation for checked in failed))
        summary = (
            f"{names}: first {first.call.operation} ({first.call.shapes}), {distribution} inputs: {finding.name}: "
            f"{finding.problem}."
        )
    else:
        summary = f"all {operations} operations, in {len(ran)} calls, are as exact as plain torch."
    sections: list[Section] = [_heat(ran), _calls(ran), _measured(ran)]
    changed = [
        (
            checked.captured.operation,
            checked.captured.shapes,
            "not run" if checked.skipped else f"run as {checked.call.shapes}",
        )
        for checked in found
        if checked.skipped or checked.call != checked.captured
    ]
    if changed:
        sections.append(Table("Not as the model calls it", ("operation", "as called", "here"), changed))
    return Report("Operations", "different" if failed else "same", summary, sections, about)


def _worst(findings: Sequence[Finding]) -> Optional[float]:
    return max((finding.share for finding in findings), default=None)


def _name(checked: Checked, number: int) -> str:
    return f"{number} {checked.call.operation}"


def _heat(ran: Sequence[Checked]) -> Heatmap:
    values = [[_worst(checked.findings.get(name, ())) for name in DISTRIBUTIONS] for checked in ran]
    names = [_name(checked, number) for number, checked in enumerate(ran, 1)]
    note = "The worst output or gradient of each call. Integers have to be equal: 0 where they are."
    return Heatmap("Errors as a share of what passes", names, list(DISTRIBUTIONS), values, 1.0, note)


def _calls(ran: Sequence[Checked]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for number, checked in enumerate(ran, 1):
        failures = checked.failures()
        all_found = [finding for findings in checked.findings.values() for finding in findings]
        what = f"{failures[0][0]} inputs: {failures[0][1].name}: {failures[0][1].problem}" if failures else "passes"
        rows.append((_name(checked, number), checked.call.shapes, checked.times, _worst(all_found), what))
    marks = ["different" if checked.failures() else "same" for checked in ran]
    columns = ("operation", "arguments", "calls", "share of what passes", "verdict")
    return Table("Calls of a micro-batch", columns, rows, marks)


def _measured(ran: Sequence[Checked]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    marks = []
    for number, checked in enumerate(ran, 1):
        for distribution, findings in checked.findings.items():
            for finding in findings:
                place = (_name(checked, number), distribution, finding.name, finding.dtype)
                rows.append((*place, *_figures(finding.errors), *_ulps(finding.plain), finding.problem or "passes"))
                marks.append("same" if finding.passed else "different")
    columns = (
        *("operation", "inputs", "of", "dtype", "max relative", "mean relative", "1 − cosine", "max ulps", "mean ulps"),
        *("plain max ulps", "plain mean ulps", "verdict"),
    )
    note = "Relative errors are shares of the reference's root mean square. What is no floating tensor has to be equal."
    return Table("All that was measured", columns, rows, marks, note)


def _figures(errors: Optional[Errors]) -> tuple[Cell, ...]:
    if errors is None:
        return (None,) * 5
    return errors.max_relative, errors.mean_relative, 1 - errors.cosine, errors.max_ulps, errors.mean_ulps


def _ulps(errors: Optional[Errors]) -> tuple[Cell, ...]:
    return (None, None) if errors is None else (errors.max_ulps, errors.mean_ulps)
