"""What a verification found: a verdict, a sentence, curves, heat maps and tables; for people in one HTML file, for
machines in JSON (`page.py` lays it out)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, Union

from backends.errors import UserError
from trainer.metrics.jsonl import finite

Verdict = Literal["same", "different"]
Cell = Union[str, int, float, bool, None]


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    Attributes:
        marks: of each row ``same``, ``different``, or empty where it is neither; no marks at all for a plain table.
        note: a sentence below it.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marks: Sequence[str] = ()
    note: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title
        assert not self.marks or len(self.marks) == len(self.rows), self.title
        assert set(self.marks) <= {"same", "different", ""}, self.title

    def mark(self, row: int) -> str:
        """The mark of a row, empty where the table has none."""
        return self.marks[row] if self.marks else ""


@dataclass(frozen=True)
class Lines:
    """Several curves over the same axis.

    Attributes:
        series: (x, y) of the points of each curve by name. A y that is not finite is a gap.
        log: whether the y-axis is logarithmic, on which points at 0 or below have no place.
        bounds: values that are drawn as dashed lines across, by name.
    """

    kind: ClassVar[str] = "lines"
    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    x: str = "step"
    y: str = ""
    log: bool = False
    bounds: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Heatmap:
    """A value for each row and column, such as the error of every layer in every phase.

    Attributes:
        values: one list a row; None where there is nothing to compare. Colours are logarithmic, and 0 has none.
        bound: values above it are what the verdict is about; None: none is.
    """

    kind: ClassVar[str] = "heatmap"
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Optional[float]]]
    bound: Optional[float] = None
    note: str = ""

    def __post_init__(self) -> None:
        assert len(self.values) == len(self.rows), self.title
        assert all(len(row) == len(self.columns) for row in self.values), self.title


Section = Union[Table, Lines, Heatmap]


@dataclass(frozen=True)
class Report:
    """What a verification found.

    Attributes:
        summary: one sentence: the first difference, or what was found to be the same.
        sections: pictures are shown before tables, otherwise in this order.
        about: what was compared with what, and how: names and values.
    """

    title: str
    verdict: Verdict
    summary: str
    sections: Sequence[Section] = ()
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 for same, 1 for different; 2 is left to what could not be compared, a UserError."""
        return 0 if self.verdict == "same" else 1

    def write_html(self, path: str) -> None:
        """One file that needs no other. The same report gives the same file.

        Raises:
            UserError: ``path`` cannot be written.
        """
        from trainer.verify.page import page  # draws with matplotlib, which takes a while to import

        _write(path, page(self), "--html")

    def write_json(self, path: str) -> None:
        """The same as :meth:`write_html`, for machines; a number that is not finite is null.

        Raises:
            UserError: ``path`` cannot be written.
        """
        _write(path, json.dumps(finite(self.content()), allow_nan=False) + "\n", "--json")

    def write_markdown(self, path: str) -> None:
        """Verdict and tables, for documents and comments.

        Raises:
            UserError: ``path`` cannot be written.
        """
        lines = [f"**{self.verdict.capitalize()}:** {_in_cell(self.summary)}", ""]
        for section in self.sections:
            if isinstance(section, Table):
                lines += [f"### {section.title}", "", *_rows(section), ""]
                lines += [section.note, ""] if section.note else []
        _write(path, "\n".join(lines), "--markdown")

    def content(self) -> dict[str, Any]:
        """Everything in it as dictionaries and lists."""
        sections = [{"kind": section.kind, **asdict(section)} for section in self.sections]
        return {**asdict(self), "sections": sections}


def _write(path: str, text: str, flag: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{flag} {path}: cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from error


def _rows(table: Table) -> list[str]:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return [f"| {' | '.join(_in_cell(shown(cell)) for cell in row)} |" for row in rows]


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")


def shown(cell: Cell) -> str:
    """A cell as people read it: three significant digits, yes and no, a dash for nothing."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)
