"""How the documents of one file are read: plain text, JSON lines and Parquet.

A reader takes a file and a cursor (None = its beginning) and yields ``(name, text, cursor after it)``.
Cursors are lists of integers; starting from one reads no document twice.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from backends.errors import UserError

Cursor = Optional[list[int]]


@dataclass(frozen=True)
class TextFile:
    """A file of a corpus. ``name`` is relative to what the config lists; ``size`` is in bytes."""

    path: Path
    name: str
    size: int
    mtime_ns: int


Reader = Callable[[TextFile, Cursor], Iterator[tuple[str, str, list[int]]]]


def read_text(file: TextFile, cursor: Cursor = None) -> Iterator[tuple[str, str, list[int]]]:
    """The whole file as one document. Raises UserError if it is not UTF-8."""
    if cursor:
        return
    try:
        yield file.name, file.path.read_bytes().decode("utf-8-sig"), [1]
    except UnicodeDecodeError as error:
        raise UserError(f"{file.path}: byte {error.start} is not UTF-8; convert the file or leave it out") from error


def read_text_leniently(file: TextFile, cursor: Cursor = None) -> Iterator[tuple[str, str, list[int]]]:
    """Like :func:`read_text`, but a file that is not UTF-8 holds no document."""
    try:
        yield from read_text(file, cursor)
    except UserError:
        return


def read_jsonl(field: str) -> Reader:
    """Reader of one JSON object a line, whose ``field`` is the text. Cursor: [byte offset, lines before it].

    Raises UserError, with file and line number, for a line that is not a JSON object with that field as a string.
    """

    def read(file: TextFile, cursor: Cursor = None) -> Iterator[tuple[str, str, list[int]]]:
        offset, number = cursor or (0, 0)
        with file.path.open("rb") as lines:
            lines.seek(offset)
            for line in lines:
                offset += len(line)
                number += 1
                if line.strip():
                    yield f"{file.name}:{number}", _text_of(line, field, f"{file.path}:{number}"), [offset, number]

    return read


def _text_of(line: bytes, field: str, where: str) -> str:
    remedy = "fix or remove the line"
    try:
        row = json.loads(line.rstrip(b"\r\n"))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid JSON (byte {error.start} is not UTF-8); {remedy}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON (nested too deeply); {remedy}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object but {type(row).__name__}; {remedy}")
    if field not in row:
        raise UserError(
            f"{where}: no field {field!r} (fields: {_listed(list(row))}); set data.text_field to the right one, "
            f"or {remedy}"
        )
    text = row[field]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: field {field!r} holds {type(text).__name__}, not a string; set data.text_field to the right "
            f"one, or {remedy}"
        )
    if b"\\u" in line:  # only an escape can smuggle in half a surrogate pair, which no tokenizer accepts
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: field {field!r} holds half of a surrogate pair at {error.start}; {remedy}"
            ) from error
    return text


def read_parquet(field: str) -> Reader:
    """Reader of Parquet rows, whose column ``field`` is the text. Cursor: [rows read].

    Raises UserError, with the file, for a file that is not Parquet or lacks the column, and with the row (from 0)
    for a value that is not a string.
    """

    def read(file: TextFile, cursor: Cursor = None) -> Iterator[tuple[str, str, list[int]]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(file.path) as table:
                names = table.schema_arrow.names
                if field not in names:
                    raise UserError(
                        f"{file.path}: no column {field!r} (columns: {_listed(names)}); set data.text_field to one of "
                        "them"
                    )
                start = cursor[0] if cursor else 0
                row = 0
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if row + rows <= start:
                        row += rows
                        continue
                    for batch in table.iter_batches(batch_size=1024, row_groups=[group], columns=[field]):
                        for text in batch.column(0).to_pylist():
                            row += 1
                            if row > start:
                                yield (
                                    f"{file.name}:{row - 1}",
                                    _string(text, field, f"{file.path}: row {row - 1}"),
                                    [row],
                                )
        except pa.ArrowException as error:
            raise UserError(
                f"{file.path}: not a readable Parquet file ({first_line(error)}); write it again or leave it out"
            ) from error

    return read


def _string(text: object, field: str, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(
            f"{where}: column {field!r} holds {type(text).__name__}, not a string; set data.text_field to a text "
            "column, or remove the row"
        )
    return text


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def first_line(error: BaseException) -> str:
    """What another library's exception says, cut to one short line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
