"""A report as one HTML page: the verdict, the pictures, the tables. Readable in light and in dark."""

import math
from html import escape

from trainer.verify.lines import svg
from trainer.verify.report import Heatmap, Lines, Report, Section, Table, shown
from trainer.verify.style import STYLE


def page(report: Report) -> str:
    """The whole document, with its style and its pictures inside."""
    pictures = [section for section in report.sections if not isinstance(section, Table)]
    tables = [section for section in report.sections if isinstance(section, Table)]
    about = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in report.about.items()
    )
    body = "\n".join(_section(section) for section in (*pictures, *tables))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(report.title)}: {report.verdict}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(report.title)}</h1>
<p class="verdict {report.verdict}"><strong>{report.verdict.capitalize()}</strong>
<span>{escape(report.summary)}</span></p>
<dl>{about}</dl>
</header>
{body}
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    drawn = {Table: _table, Lines: _lines, Heatmap: _heatmap}[type(section)](section)  # type: ignore[operator]
    note = f"<p class=note>{escape(section.note)}</p>" if section.note else ""
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{drawn}\n{note}</section>"


def _table(table: Table) -> str:
    head = "".join(
        f"<th{' class=number' if _is_number(table, column) else ''}>{escape(name)}</th>"
        for column, name in enumerate(table.columns)
    )
    rows = []
    for number, row in enumerate(table.rows):
        cells = "".join(
            f"<td{' class=number' if _is_number(table, column) else ''}>{escape(shown(cell))}</td>"
            for column, cell in enumerate(row)
        )
        mark = table.mark(number)
        rows.append(f"<tr class={mark}>{cells}</tr>" if mark else f"<tr>{cells}</tr>")
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _is_number(table: Table, column: int) -> bool:
    """Whether a column holds numbers and nothing else."""
    cells = [row[column] for row in table.rows if row[column] is not None]
    return bool(cells) and all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in cells)


def _lines(lines: Lines) -> str:
    points = [y for curve in lines.series.values() for _, y in curve]
    hidden = sum(y <= 0 for y in points) if lines.log else 0
    left_out = f"<p class=note>{hidden} of {len(points)} points are 0 and have no place here.</p>" if hidden else ""
    return f"<figure>{svg(lines)}</figure>{left_out}"


def _heatmap(heatmap: Heatmap) -> str:
    found = [value for row in heatmap.values for value in row if value is not None and 0 < value < math.inf]
    strongest = max([*found, heatmap.bound or 0])  # what is well below the bound shall not look like an alarm
    low, high = (math.log(min(found)), math.log(strongest)) if found else (0.0, 0.0)
    head = "".join(f"<th>{escape(name)}</th>" for name in heatmap.columns)
    rows = []
    for name, values in zip(heatmap.rows, heatmap.values, strict=True):
        cells = []
        for column, value in zip(heatmap.columns, values, strict=True):
            title = escape(f"{name}, {column}: {'nothing to compare' if value is None else f'{value:.3e}'}")
            over = value is not None and heatmap.bound is not None and not value <= heatmap.bound
            style = f' style="background: rgb(var(--hot) / {_heat(value, low, high):.0%})"' if value else ""
            text = "" if value is None else f"{value:.2g}" if value == 0 or 0.01 <= value < 100 else f"{value:.0e}"
            cells.append(f'<td{" class=over" if over else ""}{style} title="{title}">{text}</td>')
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    body = "\n".join(rows)
    bound = f"<p class=note>Outlined: above {heatmap.bound:.3g}.</p>" if heatmap.bound is not None else ""
    table = f"<table class=heat><thead><tr><th></th>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>{bound}'


def _heat(value: float, low: float, high: float) -> float:
    """How strong the colour of a value is: 8 % for the least, 80 % for the most and for what is not finite."""
    if not math.isfinite(value):
        return 0.8
    return 0.08 + 0.72 * ((math.log(value) - low) / (high - low) if high > low else 1)
