"""Every layout of some processes beside one process: which there are, which a config can run, how far each is off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Union

from backends.errors import UserError
from parallel.pipeline.order import SCHEDULES
from trainer.config.schema import Config
from trainer.config.validate import validate_layout
from trainer.verify.difference import Difference
from trainer.verify.report import Cell, Heatmap, Report, Section, Table


@dataclass(frozen=True)
class Layout:
    """How ranks share a model: pipeline, experts, and replicas of experts."""

    schedule: str = "1f1b"
    pp: int = 1
    ep: int = 1
    edp: int = 1
    recompute: bool = False

    @property
    def world(self) -> int:
        return self.pp * self.ep * self.edp

    @property
    def name(self) -> str:
        """Also the name of its run's folder."""
        schedule = (self.schedule,) if self.pp > 1 else ()
        marks = ("recompute",) if self.recompute else ()
        return "-".join([*schedule, f"pp{self.pp}", f"ep{self.ep}", f"edp{self.edp}", *marks])

    def overrides(self) -> list[str]:
        """The keys of a config that say it."""
        return [
            f"parallel.pipeline={self.pp}",
            f"parallel.schedule={self.schedule}",
            f"parallel.expert={self.ep}",
            f"train.activation_checkpointing={'layer' if self.recompute else 'none'}",
        ]


REFERENCE = Layout()


def every_layout(world: int) -> list[Layout]:
    """All factorisations of ``world`` into pp × ep × edp, every schedule where there is a pipeline, with and without
    recomputation; first one process with recomputation."""
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    found = [Layout(recompute=True)] if world > 1 else []
    for recompute, pp, ep in product((False, True), sizes, sizes):
        if world % (pp * ep) == 0:
            for schedule in SCHEDULES if pp > 1 else (REFERENCE.schedule,):
                found.append(Layout(schedule, pp, ep, world // pp // ep, recompute))
    return [layout for layout in found if layout != REFERENCE]


@dataclass(frozen=True)
class Refused:
    """A layout that the config cannot have."""

    reason: str


def fitted(layout: Layout, config: Config, where: str) -> Union[list[str], Refused]:
    """The overrides with which a config runs under a layout.

    Micro-batches are the config's own where they fit, else the largest that divide them and fit.

    Args:
        where: the config file, for reasons.
    """
    own, reason = config.train.micro_batch_size, ""
    for size in (size for size in range(own, 0, -1) if own % size == 0):
        parallel = replace(config.parallel, pipeline=layout.pp, schedule=layout.schedule, expert=layout.ep)
        wanted = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=size))
        try:
            validate_layout(wanted, layout.world, where)
        except UserError as error:
            reason = reason or str(error).removeprefix(f"{where}: ")
        else:
            return [*layout.overrides(), f"train.micro_batch_size={size}"]
    return Refused(reason)


Found = Union[Difference, Refused, str]
"""What became of a layout; a string says why it did not train to its end."""

_FIGURES = {"loss": "losses", "grad_norm": "norms", "weights": "weights", "moments": "moments"}


def differs(found: Found, bound: float) -> bool:
    """Whether a layout trained to its end, and another model."""
    return isinstance(found, Difference) and not found.within(bound)


def report(
    outcomes: Mapping[Layout, Found], firsts: Mapping[Layout, str], bound: float, about: Mapping[str, str]
) -> Report:
    """The matrix. A layout that does not apply is no difference.

    Args:
        firsts: where layouts part from one process, of those where that was looked for.
    """
    ran = {layout: found for layout, found in outcomes.items() if not isinstance(found, Refused)}
    refused = {layout: found for layout, found in outcomes.items() if isinstance(found, Refused)}
    bad = {layout: found for layout, found in ran.items() if isinstance(found, str) or differs(found, bound)}
    if bad:
        first, found = next(iter(bad.items()))
        summary = (
            f"{len(bad)} of {len(ran)} layouts differ from one process, first {first.name}: {_words(found, bound)}."
        )
    else:
        summary = f"all {len(ran)} layouts train the model that one process trains, within {bound:.0e}."
    columns = ("schedule", "pp", "ep", "edp", "recompute", *_FIGURES.values(), "load, bias", "verdict")
    rows = [
        (*_place(layout), *_figures(found), "same" if layout not in bad else "different")
        for layout, found in ran.items()
    ]
    marks = ["different" if layout in bad else "same" for layout in ran]
    note = (
        "Largest relative differences over all steps: of losses, of the gradient norm, and of the final weights and "
        f"moments (norm of the difference over the norm, the worst tensor). The bound is {bound:.0e}, for moments "
        f"{10 * bound:.0e}. Tokens per expert at every step and the experts' final biases have to be equal."
    )
    sections: list[Section] = [_heat(ran, bound), Table("Layouts", columns, rows, marks, note)]
    if firsts:
        traced = [(layout.name, first) for layout, first in firsts.items()]
        sections.append(Table("First difference, by a trace of a few steps", ("layout", "where"), traced))
    failed = [(layout.name, found) for layout, found in ran.items() if isinstance(found, str)]
    if failed:
        sections.append(Table("Did not train to the end", ("layout", "why"), failed, ["different"] * len(failed)))
    if refused:
        reasons: dict[str, list[str]] = {}
        for layout, refusal in refused.items():
            reasons.setdefault(refusal.reason, []).append(layout.name)
        alike = [(", ".join(names), reason) for reason, names in reasons.items()]
        sections.append(Table("Does not apply", ("layouts", "why"), alike))
    return Report("Layouts against one process", "different" if bad else "same", summary, sections, about)


def _words(found: Found, bound: float) -> str:
    """What is wrong with a layout."""
    if not isinstance(found, Difference):
        return str(found)
    worst, share = max(found.shares(bound).items(), key=lambda item: item[1])
    if share >= 1:
        return f"{_FIGURES[worst]} are {getattr(found, worst):.1e} apart"
    return "tokens per expert are not equal" if not found.load_equal else "the experts' biases are not equal"


def _place(layout: Layout) -> tuple[Cell, ...]:
    schedule = layout.schedule if layout.pp > 1 else None
    return schedule, layout.pp, layout.ep, layout.edp, layout.recompute


def _figures(found: Found) -> tuple[Cell, ...]:
    if not isinstance(found, Difference):
        return (*(None for _ in _FIGURES), None)
    values = asdict(found)
    equal = "equal" if found.load_equal and found.bias_equal else "unequal"
    return (*(f"{values[name]:.1e}" for name in _FIGURES), equal)


def _heat(ran: Mapping[Layout, Found], bound: float) -> Heatmap:
    shares = [
        [found.shares(bound)[name] if isinstance(found, Difference) else None for name in _FIGURES]
        for found in ran.values()
    ]
    below_one = math.nextafter(1, 0)  # at the bound is beyond it
    return Heatmap(
        "Difference as a share of its bound",
        [layout.name for layout in ran],
        list(_FIGURES.values()),
        shares,
        below_one,
    )
