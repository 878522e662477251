"""Timelines of a pipeline as text: a row per rank, time to the right, as wide as a terminal."""

import math
from statistics import quantiles
from typing import NamedTuple

from rich.text import Text

from parallel.pipeline.timeline import Span, Timeline

_KINDS = {
    "F": ("forward", "black on bright_blue"),
    "B": ("backward", "black on bright_green"),
    "I": ("input gradients", "black on green"),
    "W": ("weight gradients", "black on yellow"),
    "F+B": ("both at once", "black on bright_cyan"),
}
_BLOCKS = 12  # at most: actions that are too short for it go without their number


class _Cell(NamedTuple):
    """What one rank does from ``start`` to ``end``, as one box."""

    kind: str
    label: str
    start: float
    end: float


def rows(timeline: Timeline, width: int) -> list[Text]:
    """Lines of at most ``width`` characters; where a step is longer it goes on in a block below.

    Each action is a letter for its kind, lower-case on the second, fourth ... chunk of a rank, and the number of its
    micro-batch. Dashes go on to its end, and dots are idle time.
    """
    ranks = [_cells(spans, held) for spans, held in zip(timeline.ranks, timeline.layout, strict=True)]
    names = [f"rank {rank}  " for rank in range(len(ranks))]
    columns = max(1, width - max(len(name) for name in names))
    scale = _scale([cell for cells in ranks for cell in cells], timeline.total, columns)
    whole = max(1, math.ceil(timeline.total * scale - 1e-9))
    drawn = [_row(cells, scale, whole) for cells in ranks]
    lines: list[Text] = []
    for start in range(0, whole, columns):
        lines += [Text()] if lines else []
        for name, row in zip(names, drawn, strict=True):
            lines.append(Text(name.rjust(width - columns), "bold") + row[start : start + columns])
            lines[-1].rstrip()
    return lines


def legend(timeline: Timeline) -> Text:
    """What the letters of :func:`rows` mean, those that are there."""
    cells = [cell for spans, held in zip(timeline.ranks, timeline.layout, strict=True) for cell in _cells(spans, held)]
    shown = Text()
    for kind, (name, style) in _KINDS.items():
        if any(cell.kind == kind for cell in cells):
            shown += Text.assemble((kind, style), f" {name}   ")
    chunks = max(len(held) for held in timeline.layout)
    if chunks > 1:
        shown += Text(f"lower case: {'the' if chunks == 2 else 'every'} second chunk of a rank   ")
    return shown + Text(". idle")


def _cells(spans: list[Span], held: list[int]) -> list[_Cell]:
    """A box for each span; spans that share time share a box."""
    cells: list[_Cell] = []
    for span in sorted(spans, key=lambda span: (span.start, span.kind != "F")):
        label = f"{span.kind if held.index(span.stage) % 2 == 0 else span.kind.lower()}{span.micro_batch}"
        if cells and span.start < cells[-1].end:
            before = cells.pop()
            cells.append(_Cell("F+B", f"{before.label}+{label}", before.start, max(before.end, span.end)))
        else:
            cells.append(_Cell(span.kind, label, span.start, span.end))
    return cells


def _scale(cells: list[_Cell], total: float, columns: int) -> float:
    """Characters per unit of time: so that most labels fit, with a space behind them."""
    wanted = [(len(cell.label) + 1) / (cell.end - cell.start) for cell in cells if cell.end > cell.start]
    if not wanted:
        return 1.0
    most = quantiles(wanted, n=10, method="inclusive")[8] if len(wanted) > 1 else wanted[0]
    return min(most, _BLOCKS * columns / total)


def _row(cells: list[_Cell], scale: float, whole: int) -> Text:
    row = Text()
    for cell in cells:
        start, end = round(cell.start * scale), round(cell.end * scale)
        row += Text("." * (start - len(row)), "dim")
        room = end - len(row)
        if room == 1:
            row += Text(cell.label[0], _KINDS[cell.kind][1])
        elif room > 1:
            row += Text(cell.label[: room - 1].ljust(room - 1, "-"), _KINDS[cell.kind][1]) + Text(" ")
    return row + Text("." * (whole - len(row)), "dim")
