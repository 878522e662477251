"""The list of a checkpoint's files with their sizes and checksums, and what to compare with it."""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backends.errors import UserError
from trainer.checkpoint.folder import sync

MANIFEST = "manifest.json"
INSTEAD = "delete this folder, and the checkpoint before it is the newest"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One file: its bytes and their SHA-256, in hexadecimal."""

    size: int
    sha256: str


class HashedStream(io.RawIOBase):
    """A binary file being written, whose checksum is taken on the way: what was meant, not what the disk made of it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._hash, self._size = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._size += len(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def entry(self) -> Entry:
        """What was written so far."""
        return Entry(self._size, self._hash.hexdigest())


def entry_of(path: Path) -> Entry:
    """Read a file from one end to the other."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return Entry(size, digest.hexdigest())


def write(checkpoint: Path, entries: dict[str, Entry]) -> None:
    """Write the manifest of the files named."""
    files = {name: asdict(entries[name]) for name in sorted(entries)}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def seal(checkpoint: Path, entries: dict[str, Entry]) -> None:
    """Write the manifest of all files, and have the disk hold them.

    Args:
        entries: of the files that are known, and on the disk, already.
    """
    inside = [path for path in checkpoint.rglob("*") if path.is_file()]
    others = {str(path.relative_to(checkpoint)): path for path in inside}
    others = {name: path for name, path in others.items() if name not in entries}
    write(checkpoint, entries | {name: entry_of(path) for name, path in others.items()})
    folders = [path for path in checkpoint.rglob("*") if path.is_dir()]
    for path in (*others.values(), checkpoint / MANIFEST, *folders, checkpoint):
        sync(path)


def read(checkpoint: Path) -> dict[str, Entry]:
    """What the manifest says, by file name.

    Raises:
        UserError: it cannot be read.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return {name: Entry(int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint}/{MANIFEST}: cannot be read ({error}); {INSTEAD}") from error


def check_sizes(checkpoint: Path, instead: str = INSTEAD) -> None:
    """The quick check before a checkpoint is read.

    Args:
        instead: what to do if it is damaged.

    Raises:
        UserError: a file is missing or has another size than it was written with.
    """
    for name, problem in damages(checkpoint, contents=False).items():
        raise UserError(f"{checkpoint / name}: is damaged ({problem}); {instead}")


def damages(checkpoint: Path, contents: bool = True) -> dict[str, str]:
    """Compare a checkpoint with its manifest; what is wrong, by file name.

    Args:
        contents: read every file, instead of asking for its size only.
    """
    try:
        entries = read(checkpoint)
    except UserError:
        return {MANIFEST: "missing or unreadable"}
    found = {name: _problem(checkpoint / name, entry, contents) for name, entry in entries.items()}
    return {name: problem for name, problem in found.items() if problem}


def _problem(path: Path, entry: Entry, contents: bool) -> str:
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{size:,} bytes instead of {entry.size:,}"
        return "its checksum is another" if contents and entry_of(path) != entry else ""
    except OSError as error:
        return error.strerror or type(error).__name__
