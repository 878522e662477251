"""What every picture of ours begins and ends with."""

import io
from typing import Any

from backends.errors import UserError


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, without pyplot: it needs no display and keeps no state.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed; `pip install matplotlib`") from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save(figure: Any, out: str) -> None:
    """Write a PNG, SVG or PDF file; the same picture gives the same SVG.

    Raises:
        UserError: ``out`` cannot be written, or its suffix names no format.
    """
    try:
        with _settings():
            figure.savefig(out, metadata={"Date": None} if out.endswith(".svg") else None)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: {error}; give a writable .png, .svg or .pdf file") from None


def svg_of(figure: Any) -> str:
    """The text of an SVG file without a background."""
    file = io.StringIO()
    with _settings():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _settings() -> Any:
    """Text stays text, in one font: smaller, and it can be searched."""
    from matplotlib import rc_context

    return rc_context({"svg.fonttype": "none", "svg.hashsalt": "moebius", "font.sans-serif": ["DejaVu Sans"]})
