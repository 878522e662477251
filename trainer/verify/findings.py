"""What a comparison of two traces says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.verify.readings import Key

DATA, INITIAL, FORWARD, BACKWARD, UPDATE, STILL, TRAJECTORY = PHASES = (
    "data",
    "initial weights",
    "first forward",
    "first backward",
    "first update",
    "learning rate 0",
    "trajectory",
)


@dataclass(frozen=True)
class Finding:
    """A difference that rounding does not explain: the first of its phase.

    Attributes:
        place: module or parameter, or what else differs.
        likely: the class of fault that the evidence supports.
        evidence: one line, with numbers.
    """

    phase: str
    run: str
    step: int
    place: str
    likely: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.phase}, step {self.step}: {self.place}: {self.likely} ({self.evidence})"


@dataclass(frozen=True)
class Measured:
    """One reading of both traces."""

    key: Key
    distance: float
    tolerance: float

    @property
    def differs(self) -> bool:
        """Whether the distance is more than rounding."""
        return not self.distance <= self.tolerance

    @property
    def share(self) -> float:
        """The distance in units of the tolerance, infinite where there is none."""
        if not self.tolerance:
            return math.inf if self.distance else 0.0
        return self.distance / self.tolerance


@dataclass(frozen=True)
class Phase:
    """One phase of the comparison.

    Attributes:
        ties: choices of experts that fell the other way within rounding.
        loose: such choices came before, so that only the published thresholds were asked of losses and norms.
    """

    name: str
    measured: Sequence[Measured]
    finding: Finding | None
    ties: int = 0
    loose: bool = False

    @property
    def worst(self) -> Measured | None:
        """The reading with the largest distance for its tolerance."""
        return max(self.measured, key=lambda each: each.share, default=None)


@dataclass(frozen=True)
class Comparison:
    """Of two traces, phase by phase.

    Attributes:
        one, other: names of the traces.
        differing: config keys that differ, with both values.
        measured_floor: whether one of the traces has a noise floor of its own.
    """

    one: str
    other: str
    phases: Sequence[Phase]
    differing: dict[str, tuple[object, object]]
    measured_floor: bool

    @property
    def first(self) -> Finding | None:
        """The first difference."""
        return next((phase.finding for phase in self.phases if phase.finding), None)

    @property
    def same(self) -> bool:
        """Whether there is none."""
        return self.first is None
