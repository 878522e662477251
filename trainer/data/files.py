"""Files as a source of documents: which files a config names, and a resumable walk over them."""

import glob
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backends.errors import UserError
from trainer.data.documents import Document, fingerprint
from trainer.data.formats import Cursor, Reader, TextFile

# Not the library itself: other people's packages, and tests that double its size.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def find_files(entries: list[str], suffix: str, where: str, key: str) -> list[TextFile]:
    """The files that ``entries`` name, each once, sorted within each entry.

    Args:
        entries: files, globs, and folders, which stand for every file below them, hidden ones apart.
        suffix: what a file in a folder has to end in; empty takes all.
        where, key: the config file and the key of ``entries``, for messages.

    Raises:
        UserError: if there are no entries, or one matches no file or only empty ones.
    """
    if not entries:
        raise UserError(f"{where}: {key}: is empty; list at least one file, folder or glob")
    found: dict[str, TextFile] = {}
    for entry in entries:
        files = [_described(path, root) for path, root in _matches(Path(entry).expanduser(), suffix)]
        if not files:
            what = f"no {suffix} file in folder" if suffix and Path(entry).expanduser().is_dir() else "no file matches"
            raise UserError(f"{where}: {key}: {what} {entry!r}; give an existing file, folder or glob")
        if not any(file.size for file in files):
            raise UserError(f"{where}: {key}: {entry!r} is empty; give a file with text in it")
        for file in files:
            found.setdefault(os.path.realpath(file.path), file)
    return list(found.values())


def _matches(entry: Path, suffix: str) -> list[tuple[Path, Path]]:
    """(file, the folder that its name is relative to) for one entry of a config."""
    if entry.is_file():
        return [(entry, entry.parent)]
    if entry.is_dir():
        inside = sorted(path for path in entry.rglob(f"*{suffix}") if path.is_file())
        return [(path, entry) for path in inside if not _is_hidden(path.relative_to(entry))]
    if not glob.has_magic(str(entry)):
        return []
    fixed = list(entry.parts)
    while any(glob.has_magic(part) for part in fixed):
        fixed.pop()
    return [(path, Path(*fixed)) for path in map(Path, sorted(glob.glob(str(entry), recursive=True))) if path.is_file()]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _described(path: Path, root: Path) -> TextFile:
    status = path.stat()
    return TextFile(path, path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)


def stdlib_files(where: str) -> list[TextFile]:
    """The .py files of the standard library of the interpreter in use, without tests and installed packages.

    Raises UserError if this interpreter keeps none (some embedded ones ship a zip file).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in _NOT_STDLIB]  # installed packages can be huge: stay out
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise UserError(
            f"{where}: data.source: this Python has no library sources in {str(root)!r}; use data.source: text"
        )
    return [_described(path, root) for path in sorted(paths)]


class FileSource:
    """Documents of a list of files, in order. Empty texts are passed over.

    Args:
        files: see :func:`find_files`.
        read: how one file is read; see :mod:`trainer.data.formats`.
        kind: whatever changes the documents besides the files (format, field), for the fingerprints.
        where, key: the config file and key that named the files, for messages.
    """

    def __init__(self, files: list[TextFile], read: Reader, kind: str, where: str, key: str) -> None:
        self.files, self.read, self.kind, self.where, self.key = files, read, kind, where, key

    def identity(self) -> str:
        """From the files' paths, sizes and times of change; no file is opened."""
        entries = [(os.path.realpath(file.path), file.name, file.size, file.mtime_ns) for file in self.files]
        return fingerprint(self.kind, entries)

    def signature(self) -> str:
        """From the files' names and sizes."""
        return fingerprint(self.kind, [(file.name, file.size) for file in self.files])

    def open(self, state: dict[str, Any] | None = None) -> "FileStream":
        """Raises UserError, while it is read, for a file that cannot be."""
        state = state or {"file": 0, "cursor": None}
        return FileStream(self, state["file"], state["cursor"])


class FileStream:
    """A walk over the documents of a :class:`FileSource`; a resumed one opens only the file it stopped in."""

    def __init__(self, source: FileSource, file: int, cursor: Cursor) -> None:
        self._source, self._file, self._cursor = source, file, cursor
        self._documents = self._walk()

    def _walk(self) -> Iterator[Document]:
        source = self._source
        while self._file < len(source.files):
            file = source.files[self._file]
            try:
                for name, text, cursor in source.read(file, self._cursor):
                    self._cursor = cursor
                    if text:
                        yield Document(name, text)
            except OSError as error:
                raise UserError(
                    f"{source.where}: {source.key}: cannot read '{file.path}' ({error.strerror or error}); "
                    "check the file and its permissions"
                ) from error
            self._file, self._cursor = self._file + 1, None

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        return next(self._documents)

    def state_dict(self) -> dict[str, Any]:
        return {"file": self._file, "cursor": self._cursor}
