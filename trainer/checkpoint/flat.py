"""A piece of a flattened tensor that `torch.distributed.checkpoint` reads and writes at its place in the whole.

Under ZeRO-1 a rank owns a contiguous run of the elements of a parameter, of its replicas' experts too: a run has no
rectangle in the parameter's own shape, but always one in the flattened parameter. So every parameter is stored as
one flat tensor under its full name, and any layout reads whatever runs it needs from any other's.
"""

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatPiece(torch.Tensor):
    """Elements ``offset`` to ``offset + len(self) - 1`` of a flat tensor of ``whole`` elements; shares its storage."""

    offset: int
    whole: int

    @staticmethod
    def of(values: Tensor, offset: int, whole: int) -> "FlatPiece":
        """View the 1-D tensor ``values`` as a piece."""
        assert values.dim() == 1 and offset + len(values) <= whole
        piece = values.as_subclass(FlatPiece)
        piece.offset, piece.whole = offset, whole
        return piece

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self.offset]), sizes=torch.Size([self.numel()]))

    def size(self, *dim: int) -> torch.Size:  # type: ignore[override]
        """The whole's: the load planner compares it with what was saved."""
        assert not dim
        return torch.Size([self.whole])

    # The three methods of torch.distributed._checkpointable, which DTensor has as well.

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        data = TensorWriteData(
            chunk=self._chunk(),
            properties=TensorProperties.create_from_tensor(self._plain()),
            size=torch.Size([self.whole]),
        )
        index = MetadataIndex(fqn, torch.Size([self.offset]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self._plain()

    def _plain(self) -> Tensor:
        return self.as_subclass(torch.Tensor)
