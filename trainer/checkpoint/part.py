"""One rank's part of a checkpoint, and how rank 0 makes a whole of all parts.

`torch.distributed.checkpoint` plans, writes and reads, but its collectives are not used: they would run beside those
of training. A rank needs to know nothing of the others to write what it owns. It leaves a note of what it wrote in
the folder that all ranks share, and rank 0 makes the checkpoint's metadata from the notes.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from trainer.checkpoint.folder import sync
from trainer.checkpoint.manifest import Entry, HashedStream


@dataclass(frozen=True)
class Part:
    """What a rank wrote: its plan, where each piece lies, and its files."""

    plan: SavePlan
    results: list[WriteResult]
    files: dict[str, Entry]


class _HashedFiles(FileSystem):
    """DCP's files, with a checksum taken of each one written."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        assert mode == "wb"
        with super().create_stream(path, mode) as stream:
            hashed = HashedStream(stream)
            yield hashed
            stream.flush()
            self.entries[Path(path).name] = hashed.entry()


def write_part(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    """Write a rank's tensors, and then the note that they are there and on the disk."""
    # Nothing is copied ahead (that would wait for the device's stream); we sync ourselves, after the last flush.
    writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
    writer.fs = files = _HashedFiles()
    # The rank in place of a global plan: it names the file.
    writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)
    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=rank == 0)
    plan = planner.finish_plan(writer.prepare_local_plan(planner.create_local_plan()))
    results = writer.write_data(plan, planner).wait()
    for name in files.entries:
        sync(folder / name)
    note = _note(folder, rank)
    hidden = note.with_suffix(".writing")
    hidden.write_bytes(pickle.dumps(Part(plan, results, files.entries)))
    sync(hidden)
    os.rename(hidden, note)


def missing_parts(folder: Path, ranks: int) -> list[int]:
    """Ranks whose part is not there yet."""
    there = {path.name for path in folder.iterdir()}
    return [rank for rank in range(ranks) if _note(folder, rank).name not in there]


def join_parts(folder: Path, ranks: int) -> tuple[dict[str, Entry], int]:
    """Write the metadata of the whole from the notes of all ranks, and remove them.

    Returns:
        the data files of all ranks, and how many parameters the model has.

    Raises:
        ValueError: the pieces do not make up whole tensors.
    """
    notes = [_note(folder, rank) for rank in range(ranks)]
    parts: list[Part] = [pickle.loads(note.read_bytes()) for note in notes]
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    _, metadata = planner.create_global_plan([part.plan for part in parts])
    FileSystemWriter(folder, sync_files=False).finish(metadata, [part.results for part in parts])
    for note in notes:
        note.unlink()
    tensors = metadata.state_dict_metadata.items()
    sizes = [entry.size for name, entry in tensors if name.startswith("weight.")]  # type: ignore[union-attr]
    return {name: entry for part in parts for name, entry in part.files.items()}, sum(size.numel() for size in sizes)


def _note(folder: Path, rank: int) -> Path:
    return folder / f".part-{rank}"
