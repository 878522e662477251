"""A report is one HTML file that needs no other, and the same as JSON."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from backends.errors import UserError
from trainer.verify.report import Heatmap, Lines, Report, Table

TABLE = Table(
    "Weights", ("name", "error", "equal"), [("a<b>", 1.5e-7, False), ("c", None, True)], ("different", "same")
)
LINES = Lines("Loss", {"A": [(1, 2.0), (2, 1.0)], "B": [(1, 2.0), (2, math.nan)]}, y="loss", bounds={"bound": 1.5})
HEAT = Heatmap("Layers", ["layer 0", "layer 1"], ["forward", "backward"], [[0.0, 1e-7], [None, math.inf]], bound=1e-6)
REPORT = Report("Two <layouts>", "different", "Step 2 & on.", [TABLE, LINES, HEAT], {"A": "runs/a"})


def html(report: Report, tmp_path) -> str:
    report.write_html(str(tmp_path / "report.html"))
    return (tmp_path / "report.html").read_text()


class _Balanced(HTMLParser):
    """Fails where an element is closed that is not the open one."""

    ALONE = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_verdict_then_pictures_then_tables(tmp_path):
    text = html(REPORT, tmp_path)
    body = text.partition("<body>")[2]
    places = [
        body.index(part) for part in ("Different", "Step 2 &amp; on.", "runs/a", "<h2>Loss", "<h2>Layers", "<h2>W")
    ]
    assert places == sorted(places)


def test_the_page_is_well_formed_and_needs_no_other_file(tmp_path):
    text = html(REPORT, tmp_path)
    parser = _Balanced()
    parser.feed(text)
    assert parser.open == []
    addresses = set(re.findall(r'(?:src|href)="([^"]*)"', text)) | set(re.findall(r"url\(([^)]*)\)", text))
    assert all(address.startswith("#") for address in addresses), addresses
    assert "<script" not in text and "@import" not in text and "prefers-color-scheme: dark" in text


def test_names_are_escaped(tmp_path):
    text = html(REPORT, tmp_path)
    assert "a&lt;b&gt;" in text and "<b>" not in text and "Two &lt;layouts&gt;" in text


def test_every_colour_of_a_picture_is_the_page_s(tmp_path):
    """A fixed colour would be lost on one of the two backgrounds."""
    drawn = html(REPORT, tmp_path).partition("<svg")[2].partition("</svg>")[0]
    assert "var(--series-1)" in drawn and "var(--series-2)" in drawn and "var(--different)" in drawn
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)


def test_a_heat_map_shows_what_is_equal_what_is_more_and_what_is_beyond_the_bound(tmp_path):
    cells = re.findall(r"<td([^>]*)>([^<]*)</td>", html(Report("t", "different", "s", [HEAT]), tmp_path))
    assert [text for _, text in cells] == ["0", "1e-07", "", "inf"]
    assert ["over" in mark for mark, _ in cells] == [False, False, False, True]
    assert ["--hot" in mark for mark, _ in cells] == [False, True, False, True]


def test_nan_is_beyond_every_bound(tmp_path):
    text = html(Report("t", "different", "s", [Heatmap("h", ["r"], ["c"], [[math.nan]], bound=1.0)]), tmp_path)
    assert "class=over" in text and ">nan</td>" in text


@pytest.mark.parametrize(
    "bound, strengths", [(None, ["8", "44", "80"]), (1e-4, ["8", "44", "80"]), (1.0, ["8", "26", "44"])]
)
def test_colours_are_logarithmic_up_to_the_bound(tmp_path, bound, strengths):
    heat = Heatmap("h", ["r"], ["a", "b", "c"], [[1e-8, 1e-6, 1e-4]], bound)
    found = re.findall(r"--hot\) / (\d+)%", html(Report("t", "same", "s", [heat]), tmp_path))
    assert found == strengths


def test_zeros_that_a_logarithmic_axis_cannot_show_are_said(tmp_path):
    lines = Lines("Errors", {"worst": [(1, 0.0), (2, 1e-7), (3, 0.0)]}, log=True)
    assert "2 of 3 points are 0 and have no place here." in html(Report("t", "same", "s", [lines]), tmp_path)


def test_the_same_report_gives_the_same_file(tmp_path):
    assert html(REPORT, tmp_path) == html(REPORT, tmp_path)


def test_json_holds_everything(tmp_path):
    REPORT.write_json(str(tmp_path / "report.json"))
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["title"], found["verdict"], found["summary"]) == ("Two <layouts>", "different", "Step 2 & on.")
    assert found["about"] == {"A": "runs/a"}
    table, lines, heat = found["sections"]
    assert table["kind"] == "table" and table["rows"] == [["a<b>", 1.5e-7, False], ["c", None, True]]
    assert table["marks"] == ["different", "same"]
    assert lines["kind"] == "lines" and lines["series"]["B"] == [[1, 2.0], [2, None]]
    assert heat["kind"] == "heatmap" and heat["values"] == [[0.0, 1e-7], [None, None]] and heat["bound"] == 1e-6


def test_markdown_has_verdict_and_tables(tmp_path):
    table = Table("Weights", ("name", "error"), [("a|b", 1.5e-7), ("c", None)], note="A note.")
    Report("t", "different", "Not the same.", [LINES, table]).write_markdown(str(tmp_path / "report.md"))
    assert (tmp_path / "report.md").read_text().splitlines() == [
        *("**Different:** Not the same.", "", "### Weights", "", "| name | error |", "| --- | --- |"),
        *(r"| a\|b | 1.5e-07 |", "| c | – |", "", "A note."),
    ]


def test_exit_codes():
    assert REPORT.exit_code == 1 and Report("t", "same", "s").exit_code == 0


@pytest.mark.parametrize("write", ["write_html", "write_json", "write_markdown"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path, write):
    path = str(tmp_path / "no" / "report")
    with pytest.raises(UserError, match=f"--{write[6:]} {path}: cannot be written"):
        getattr(REPORT, write)(path)
