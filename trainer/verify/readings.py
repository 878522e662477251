"""What one rank reads while a few steps run, and what the readings of all ranks come to together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from trainer.verify.sums import add, row_of


class Key(NamedTuple):
    """What a reading is of. The same under every layout."""

    run: str  # "train", or "still" for the run at learning rate 0
    step: int  # from 1; 0 is before the first
    kind: str
    name: str  # the full name of a parameter or module; of one expert with its number: layers.1.moe.experts.down[3]


class Disagreement(NamedTuple):
    """Ranks that had another value than most, where all have to have the same."""

    key: Key
    ranks: list[int]


@dataclass
class Readings:
    """Of one rank, or, merged, of all.

    Attributes:
        rows: sums of tensors (sums.py), which add up over ranks.
        same: values that every rank has to have that has one at all.
        pieces: parts of an array by the place of their first row.
        order: when a name was first met in the forward pass: first layer of the pipeline stage, number within it.
    """

    run: str = ""
    step: int = 0
    rows: dict[Key, np.ndarray] = field(default_factory=dict)
    same: dict[Key, np.ndarray] = field(default_factory=dict)
    pieces: dict[Key, dict[int, np.ndarray]] = field(default_factory=dict)
    order: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, kind: str, name: str, values: Tensor, offset: int | None = None, whole: int = 0) -> None:
        """Add a piece of a tensor; see :func:`trainer.verify.sums.row_of`."""
        key = Key(self.run, self.step, kind, name)
        self.rows[key] = add(self.rows.get(key), row_of(values, offset, whole))

    def agree(self, kind: str, name: str, value: np.ndarray) -> None:
        """A value that other ranks must have as well."""
        self.same[Key(self.run, self.step, kind, name)] = value

    def piece(self, kind: str, name: str, first: int, rows: np.ndarray) -> None:
        """Some rows of an array."""
        self.pieces.setdefault(Key(self.run, self.step, kind, name), {})[first] = rows


def merged(parts: list[Readings]) -> tuple[Readings, list[Disagreement]]:
    """The readings of all ranks as one."""
    whole, values = Readings(), dict[Key, dict[int, np.ndarray]]()
    for rank, part in enumerate(parts):
        for key, row in part.rows.items():
            whole.rows[key] = add(whole.rows.get(key), row)
        for key, value in part.same.items():
            values.setdefault(key, {})[rank] = value
        for key, pieces in part.pieces.items():
            whole.pieces.setdefault(key, {}).update(pieces)
        for name, place in part.order.items():
            whole.order[name] = min(place, whole.order.get(name, place))
    disagreements = []
    for key, by_rank in values.items():
        content = {rank: value.tobytes() for rank, value in by_rank.items()}
        usual = Counter(content.values()).most_common(1)[0][0]
        whole.same[key] = next(value for rank, value in by_rank.items() if content[rank] == usual)
        others = [rank for rank in by_rank if content[rank] != usual]
        if others:
            disagreements.append(Disagreement(key, others))
    return whole, disagreements
