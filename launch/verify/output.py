"""How every verification ends: the verdict in the terminal, and the report as files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.verify.report import Report, Table

_LONG = 60  # rows of a table that a terminal shows; of a longer one only those that differ


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """``--html``, ``--json`` and ``--markdown``."""
    parser.add_argument("--html", metavar="FILE", help="write the report as one HTML file")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="write its tables as Markdown")


def finish(report: Report, args: argparse.Namespace) -> int:
    """Write what ``args`` ask for, print verdict and tables, and return the exit code.

    Raises:
        UserError: a file cannot be written.
    """
    from rich.markup import escape

    from launch.show import console
    from trainer.verify.report import Table

    written = [path for path in (args.html, args.json, args.markdown) if path]
    if args.html:
        report.write_html(args.html)
    if args.json:
        report.write_json(args.json)
    if args.markdown:
        report.write_markdown(args.markdown)
    out = console()
    out.print(report.title, style="bold", markup=False)
    for name, value in report.about.items():
        out.print(f"  {name}: {value}", markup=False, highlight=False)
    for section in report.sections:
        if isinstance(section, Table):
            out.print()
            _print(section, out)
    out.print()
    colour = "green" if report.verdict == "same" else "red"
    out.print(f"[bold {colour}]{report.verdict}[/]: {escape(report.summary)}")
    for path in written:
        out.print(path, markup=False)
    return report.exit_code


def _print(made: Table, out: Console) -> None:
    from rich.text import Text

    from launch.show import table
    from trainer.verify.report import shown

    long = len(made.rows) > _LONG
    numbers = [number for number in range(len(made.rows)) if not long or made.mark(number) == "different"]
    out.print(made.title, style="bold", markup=False)
    if numbers:
        printed = table(*made.columns)
        for column, cells in zip(printed.columns, zip(*made.rows, strict=True), strict=True):
            column.justify = "right" if all(isinstance(cell, (int, float, type(None))) for cell in cells) else "left"
        for number in numbers:
            style = "red" if made.mark(number) == "different" else None
            printed.add_row(*(Text(shown(cell)) for cell in made.rows[number]), style=style)
        out.print(printed)
    if len(numbers) < len(made.rows):
        out.print(f"{len(numbers) or 'none'} of {len(made.rows)} rows differ; the others are in --html and --json")
    if made.note:
        out.print(made.note, markup=False)
