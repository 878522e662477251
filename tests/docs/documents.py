"""README.md and docs/ taken apart: fenced blocks, commands, code spans and links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_SHELLS = ("bash", "console", "sh", "shell")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``place`` is for messages."""

    document: Path
    place: str
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a shell block, and what the document shows as its output (None in a bash block)."""

    place: str
    text: str
    output: str | None


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document."""
    name, lines, found = document.name, document.read_text().splitlines(), []
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
        else:
            text = "\n".join(lines[opened + 1 : number])
            found.append(Block(document, f"{name}:{opened + 1}", lines[opened][3:].strip(), text))
            opened = None
    assert opened is None, f"{name}:{opened}: the block does not end"
    return found


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[Command]:
    """Every command of every shell block; a backslash at the end of a line joins it to the next."""
    found = []
    for block in (block for document in DOCUMENTS for block in blocks(document) if block.language in _SHELLS):
        text = re.sub(r"\s*\\\n\s*", " ", block.text)
        if block.language == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                found.append(Command(block.place, command.strip(), output.strip()))
        else:
            lines = (line.strip() for line in text.splitlines())
            found += [Command(block.place, line, None) for line in lines if line and not line.startswith("#")]
    return found


def spans(document: Path) -> list[str]:
    """What stands in backticks in the prose."""
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose(document))]


def links(document: Path) -> list[str]:
    """Targets of links and pictures that are not addresses on the web."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)) if "://" not in target]


def anchors(document: Path) -> set[str]:
    """What headings can be linked as."""
    headings = re.findall(r"^#+ (.*)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
