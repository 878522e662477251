"""Pieces of flattened tensors that `torch.distributed.checkpoint` reads and writes at their places in the whole.

Under ZeRO-1 a rank owns a contiguous run of the elements of a parameter, of its replicas' experts too: a run has no
rectangle in the parameter's own shape, but always one in the flattened parameter. So every parameter is stored as
one flat tensor under its full name, and any layout reads whatever runs it needs from any other's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Run:
    """Elements ``offset`` to ``offset + count - 1``, and what gives them, as a 1-D tensor, when they are wanted."""

    offset: int
    count: int
    values: Callable[[], Tensor]


class FlatRuns(torch.Tensor):
    """Some runs of a flat tensor of ``whole`` elements; holds none of them itself."""

    whole: int
    runs: Sequence[Run]

    @staticmethod
    def of_runs(runs: Sequence[Run], whole: int, dtype: torch.dtype) -> "FlatRuns":
        """The runs, whose values have ``dtype``; where a checkpoint is read they give what is filled, of any dtype."""
        made = torch.empty(0, dtype=dtype).as_subclass(FlatRuns)
        made.runs, made.whole = runs, whole
        return made

    def size(self, *dim: int) -> torch.Size:  # type: ignore[override]
        """The whole's: the load planner compares it with what was saved."""
        assert not dim
        return torch.Size([self.whole])

    # The three methods of torch.distributed._checkpointable, which DTensor has as well.

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.as_subclass(torch.Tensor))
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=torch.Size([self.whole])),
            )
            for number, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size([run.offset]), sizes=torch.Size([run.count])) for run in self.runs
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.index is not None  # runs that are read may begin at the same place
        return self.runs[index.index].values()


class FlatPiece(FlatRuns):
    """Elements ``offset`` to ``offset + len(self) - 1`` of a flat tensor of ``whole`` elements; shares its storage."""

    offset: int

    @staticmethod
    def of(values: Tensor, offset: int, whole: int) -> "FlatPiece":
        """View the 1-D tensor ``values`` as a piece."""
        assert values.dim() == 1 and offset + len(values) <= whole
        piece = values.as_subclass(FlatPiece)
        piece.offset, piece.whole = offset, whole
        piece.runs = [Run(offset, values.numel(), lambda: values)]
        return piece
