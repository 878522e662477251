"""Reading only the wanted elements of what a checkpoint's file holds.

`torch.distributed.checkpoint` reads a whole piece, as one rank wrote it, for each range of it that is wanted. A piece
can be all experts of a layer, and an export wants them one by one.
"""

import io
import math
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

BLOCK = 1 << 23  # elements read at a time
_LOCAL_HEADER = 30  # bytes before a zip member's name; the last four are the lengths of name and extra field


class RangeReader(FileSystemReader):
    """For checkpoints of flat tensors."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        """Remember the tensors' dtypes."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._tensors = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors, file by file in the order of the bytes."""
        wanted: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in wanted.items():
            starts: dict[int, int] = {}
            with (Path(self.path) / name).open("rb") as file:
                for item in sorted(items, key=lambda item: self.storage_data[item.storage_index].offset):
                    piece = self.storage_data[item.storage_index]
                    if piece.offset not in starts:
                        starts[piece.offset] = piece.offset + _start(_Slice(file, piece.offset, piece.length))
                    target, dtype = planner.resolve_tensor(item).detach(), self._dtype(item.storage_index.fqn)
                    _fill(target, file, starts[piece.offset], item, dtype)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _dtype(self, name: str) -> torch.dtype:
        saved = self._tensors[name]
        assert isinstance(saved, TensorStorageMetadata)
        return saved.properties.dtype


class _Slice:
    """Some bytes of a file as a file, as far as zipfile needs one."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        self._at = position + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        self._file.seek(self._offset + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content


def _start(piece: _Slice) -> int:
    """Where the numbers of a tensor saved by `torch.save` begin: it stores them uncompressed, in one zip member."""
    with zipfile.ZipFile(piece) as archive:
        (member,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    assert member.compress_type == zipfile.ZIP_STORED
    piece.seek(member.header_offset)
    name, extra = struct.unpack("<HH", piece.read(_LOCAL_HEADER)[-4:])
    return member.header_offset + _LOCAL_HEADER + name + extra


def _fill(target: Tensor, file: io.BufferedReader, start: int, item: ReadItem, dtype: torch.dtype) -> None:
    """Copy the wanted elements into ``target``, of any dtype, on any device."""
    first, count = math.prod(item.storage_offsets), math.prod(item.lengths)
    assert len(item.lengths) == 1 and target.numel() == count, "checkpoints are flat"
    file.seek(start + first * dtype.itemsize)
    for done in range(0, count, BLOCK):
        values = torch.empty(min(BLOCK, count - done), dtype=dtype)
        wanted = values.numel() * dtype.itemsize
        if file.readinto(values.view(torch.uint8).numpy()) != wanted:  # type: ignore[arg-type]
            raise EOFError("the file ends too early")
        target[done : done + values.numel()].copy_(values)
