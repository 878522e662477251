"""Timelines of a pipeline as a picture: a row per rank, a box per action."""

from collections.abc import Sequence
from typing import Any

from parallel.pipeline.timeline import Timeline
from trainer.metrics.figure import new_figure, save

# Kind: its name, and its colour on a rank's first chunk and on the later ones.
_KINDS = {
    "F": ("forward", "#a9c4e6", "#5b8fd0"),
    "B": ("backward", "#a8d5b0", "#4fa566"),
    "I": ("input gradients", "#c3e3c0", "#79bd7c"),
    "W": ("weight gradients", "#f6d8a8", "#e5ac54"),
}
_INK, _IDLE = "#22303f", "#f1f2f4"


def draw(timelines: Sequence[tuple[str, Timeline]], out: str, unit: str = "") -> None:
    """Draw timelines, each with the title in front of it, one below the other on one axis of time.

    Two actions at once share the height of their rank's row: the forward is above.

    Args:
        out: a PNG, SVG or PDF file.
        unit: of the times, for the axis.

    Raises:
        UserError: see :mod:`trainer.metrics.figure`.
    """
    from matplotlib.patches import Patch

    rows = [len(timeline.ranks) for _, timeline in timelines]
    figure = new_figure(10, 0.75 + sum(0.45 + 0.34 * count for count in rows))
    grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": rows})
    longest = max(timeline.total for _, timeline in timelines)
    for axes, (title, timeline) in zip(grid[:, 0], timelines, strict=True):
        _draw_one(axes, timeline, inches_per_unit=9.2 / longest)
        axes.set_title(title, loc="left", fontsize=9, color=_INK)
    grid[-1, 0].set_xlim(0, longest * 1.002)
    grid[-1, 0].set_xlabel(f"time ({unit})" if unit else "time", fontsize=8)
    used = {span.kind for _, timeline in timelines for spans in timeline.ranks for span in spans}
    chunks = max(len(stages) for _, timeline in timelines for stages in timeline.layout)
    legend = [Patch(facecolor=first, label=name) for kind, (name, first, _) in _KINDS.items() if kind in used]
    legend += [Patch(facecolor=_IDLE, label="idle")]
    if chunks > 1:
        legend += [Patch(facecolor=_KINDS["F"][2], label="darker: a rank's later chunks")]
    figure.legend(handles=legend, loc="outside upper right", ncols=len(legend), frameon=False, fontsize=8)
    save(figure, out)


def _draw_one(axes: Any, timeline: Timeline, inches_per_unit: float) -> None:
    for rank, spans in enumerate(timeline.ranks):
        axes.barh(rank, timeline.total, height=0.86, color=_IDLE, clip_on=False)
        for span in spans:
            shared = any(other.start < span.end and other.end > span.start for other in spans if other is not span)
            middle = rank + (0 if not shared else -0.215 if span.kind == "F" else 0.215)
            width, height = span.end - span.start, 0.43 if shared else 0.86
            color = _KINDS[span.kind][1 + (span.stage != timeline.layout[rank][0])]
            box = {"left": span.start, "height": height, "color": color, "edgecolor": "white", "linewidth": 0.6}
            axes.barh(middle, width, clip_on=False, **box)  # clipping would only make a longer file
            size = 6.5 if shared else 7.5
            if width * inches_per_unit > 0.011 * size * len(str(span.micro_batch)):
                text = {"ha": "center", "va": "center_baseline", "fontsize": size, "color": _INK}
                axes.text(span.start + width / 2, middle, span.micro_batch, **text)
    axes.set_yticks(range(len(timeline.ranks)), [f"rank {rank}" for rank in range(len(timeline.ranks))], fontsize=8)
    axes.set_ylim(len(timeline.ranks) - 0.5, -0.5)
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.spines[:].set_visible(False)
