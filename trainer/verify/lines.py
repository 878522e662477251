"""Curves as SVG that takes its colours from the page around it, so that it is right in light and in dark."""

import math
import re
from typing import Any

from trainer.metrics.figure import new_figure, svg_of
from trainer.verify.report import Lines

# Colours that nobody would draw in; each becomes a variable of the page.
_INK, _GRID, _BOUND = "#000011", "#000022", "#000033"
_SERIES = tuple(f"#0001{number:02x}" for number in range(1, 7))
_VARIABLES = {
    _INK: "--soft",
    _GRID: "--rule",
    _BOUND: "--different",
    **{colour: f"--series-{number}" for number, colour in enumerate(_SERIES, 1)},
}


def svg(lines: Lines) -> str:
    """An ``<svg>`` element as wide as what it stands in."""
    figure = new_figure(8, 3.2)
    axes = figure.add_subplot()
    _draw(axes, lines)
    text = svg_of(figure)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("'DejaVu Sans'", "system-ui").replace("<svg", '<svg role="img"', 1)


def _draw(axes: Any, lines: Lines) -> None:
    for number, (name, points) in enumerate(lines.series.items()):
        x, y = [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points]
        # A point between two gaps would be a line of no length.
        marker = "o" if len(points) < 40 else None
        style, colour = ("-", "--", ":")[number // len(_SERIES) % 3], _SERIES[number % len(_SERIES)]
        width = 2.4 if number == 0 and len(lines.series) > 1 else 1.2  # seen behind the others where all agree
        axes.plot(x, y, style, color=colour, linewidth=width, marker=marker, markersize=3, label=name)
    for name, bound in lines.bounds.items():
        axes.axhline(bound, color=_BOUND, linewidth=1, linestyle="--", label=name)
    if lines.log:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_xlabel(lines.x, color=_INK)
    axes.set_ylabel(lines.y, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(which="both", color=_GRID, labelcolor=_INK)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.margins(x=0.01)
    if len(lines.series) + len(lines.bounds) > 1:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
