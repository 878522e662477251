"""A recorded trace, and its two files: `trace.json` says what it is of, `trace.npz` holds the numbers.

Both are plain: numbers in numpy's format, nothing that a reader would have to execute.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backends.errors import UserError
from trainer.verify.readings import Disagreement, Key, Readings
from trainer.verify.sums import COUNT, LARGEST, SQUARE, WIDTH

HEADER, NUMBERS = "trace.json", "trace.npz"
FORMAT = 1
_SAME_AT_FIRST = ("forward", "loss", "contribution", "gradient")  # both runs begin with the same step


@dataclass
class Header:
    """What was recorded, of what, by what.

    Attributes:
        config: every key, except places of the machine.
        steps: of either run.
        order: names of the forward pass as they come.
        parameters: names as the model defines them.
        disagreements: where ranks had different values and must not.
        margin_floor: what a second pass changed in the margins of choices at most; None without one.
    """

    config: dict[str, Any]
    steps: int
    backend: str
    device: str
    versions: dict[str, str]
    layout: dict[str, int]
    order: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)
    margin_floor: float | None = None
    format: int = FORMAT


@dataclass
class Trace:
    """A few steps of two runs from the same weights: ``train``, and ``still`` at learning rate 0.

    Attributes:
        rows: sums of tensors by key, each (sums.WIDTH,).
        arrays: everything else by key.
        floor: distance of the noise pass, of the rows that it has as well; empty without one.
    """

    header: Header
    rows: dict[Key, np.ndarray]
    arrays: dict[Key, np.ndarray]
    floor: dict[Key, float] = field(default_factory=dict)

    def keys(self, run: str, step: int, *kinds: str) -> Iterator[Key]:
        """Of the rows of a step, in the order in which they were read."""
        return (key for key in self.rows if key.run == run and key.step == step and key.kind in kinds)


def check_vacant(folder: Path) -> None:
    """Raise a :class:`UserError` if there is a trace already."""
    for name in (HEADER, NUMBERS):
        if (folder / name).exists():
            raise UserError(f"--out: {folder}: holds a trace already; remove its {name}, or choose another folder")


def save(trace: Trace, folder: Path) -> None:
    """Write the two files. Raises UserError if that cannot be done."""
    keys = list(trace.rows)
    words = sorted({word for key in keys for word in (key.run, key.kind, key.name)})
    number = {word: index for index, word in enumerate(words)}
    numbers = {
        "keys": np.array([[number[k.run], k.step, number[k.kind], number[k.name]] for k in keys], np.int32),
        "rows": np.array([trace.rows[key] for key in keys]).reshape(-1, WIDTH),
        "floor": np.array([trace.floor.get(key, np.nan) for key in keys]),
        **{"/".join(map(str, key)): array for key, array in trace.arrays.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / NUMBERS, **numbers)  # type: ignore[arg-type]
        (folder / HEADER).write_text(json.dumps({**asdict(trace.header), "words": words}, indent=1))
    except OSError as error:
        raise UserError(f"--out: {folder}: cannot be written ({error.strerror}); choose another") from error


def load(folder: Path) -> Trace:
    """The trace in a folder. Raises UserError if there is none that can be read."""
    try:
        header = json.loads((folder / HEADER).read_text())
        if header.get("format") != FORMAT:
            raise UserError(f"{folder}: is a trace of format {header.get('format')}, not {FORMAT}; record it again")
        with np.load(folder / NUMBERS, allow_pickle=False) as file:
            numbers = {name: file[name] for name in file.files}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder}: holds no trace ({error.filename} is missing); give a folder that "
            "`moebius verify record --out` wrote"
        ) from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder}: the trace cannot be read ({error}); record it again") from error
    words = header.pop("words")
    keys = [Key(words[run], int(step), words[kind], words[name]) for run, step, kind, name in numbers.pop("keys")]
    rows, floor = numbers.pop("rows"), numbers.pop("floor")
    header["disagreements"] = [Disagreement(Key(*key), ranks) for key, ranks in header["disagreements"]]
    arrays = {}
    for name, array in numbers.items():
        run, step, kind, rest = name.split("/", 3)
        arrays[Key(run, int(step), kind, rest)] = array
    return Trace(
        Header(**header),
        dict(zip(keys, rows, strict=True)),
        arrays,
        {key: float(value) for key, value in zip(keys, floor, strict=True) if not np.isnan(value)},
    )


def joined(readings: Readings, disagreements: list[Disagreement], header: Header, parameters: list[str]) -> Trace:
    """Merged readings as a trace. Digests of replicas have served: they say nothing on another device."""
    arrays = {key: value for key, value in readings.same.items() if key.kind not in ("data", "replica")}
    for key, pieces in readings.pieces.items():
        arrays[key] = np.concatenate([pieces[first] for first in sorted(pieces)])
    sequences: dict[Key, dict[int, np.ndarray]] = {}
    for key, value in readings.same.items():
        if key.kind == "data":
            sequences.setdefault(key._replace(name="sequences"), {})[int(key.name)] = value
    for key, by_number in sequences.items():
        arrays[key] = np.stack([by_number[number] for number in sorted(by_number)])
    rows = {key: row for key, row in readings.rows.items() if key.kind != "weight" or key.step == 0}
    for key, row in readings.rows.items():
        if key.kind == "weight" and key.step > 0:  # sketches are linear: the change needs no copy of the weights
            change = row - readings.rows[key._replace(step=key.step - 1)]
            change[COUNT], change[SQUARE], change[LARGEST] = row[COUNT], 0, 0  # which are not linear
            rows[key._replace(kind="update")] = change
    for again in [key for key in rows if key.run == "still" and key.step == 1 and key.kind in _SAME_AT_FIRST]:
        del rows[again]
    header.order = sorted(readings.order, key=lambda name: readings.order[name])
    header.parameters = parameters
    header.disagreements = disagreements
    return Trace(header, rows, arrays)
