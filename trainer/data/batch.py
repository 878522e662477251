"""A batch of packed sequences, and how it is cut out of rows of tokens.

Shapes: B sequences, S tokens each, T = S + 1.
"""

from dataclasses import dataclass

import numpy as np
import torch

from backends.operations import IGNORED


@dataclass
class Batch:
    """Sequences to train on: four int64 tensors of shape (B, S).

    Attributes:
        tokens_BS: token ids.
        labels_BS: the id to predict at each place, which is the next token; -100 is ignored.
        positions_BS: position for the rotary embedding.
        documents_BS: number of the document within its sequence, from 0; attention stays inside equal numbers.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    positions_BS: torch.Tensor
    documents_BS: torch.Tensor

    def __len__(self) -> int:
        return self.tokens_BS.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``."""
        return Batch(*(tensor.to(device) for tensor in self._tensors()))

    def split(self, micro_batch_size: int) -> list["Batch"]:
        """Micro-batches of ``micro_batch_size`` sequences, the last one possibly smaller; none of an empty batch."""
        if not len(self):
            return []
        return [Batch(*parts) for parts in zip(*(t.split(micro_batch_size) for t in self._tensors()), strict=True)]

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.tokens_BS, self.labels_BS, self.positions_BS, self.documents_BS


def make_batch(tokens_BT: np.ndarray, documents_BT: np.ndarray, reset_at_documents: bool) -> Batch:
    """Cut rows of S + 1 consecutive tokens into inputs and labels.

    Args:
        tokens_BT: (B, S + 1) token ids.
        documents_BT: (B, S + 1) numbers of the documents they come from, consecutive along a row.
        reset_at_documents: restart positions at each document, and ignore the labels that would predict the first
            token of the next document from the end of this one. Otherwise a row is one document.
    """
    tokens_BT = tokens_BT.astype(np.int64, copy=False)
    tokens_BS, labels_BS = tokens_BT[:, :-1], tokens_BT[:, 1:].copy()
    place_BS = np.broadcast_to(np.arange(tokens_BS.shape[1]), tokens_BS.shape)
    if reset_at_documents:
        documents_BS = documents_BT[:, :-1] - documents_BT[:, :1]
        labels_BS[documents_BT[:, 1:] != documents_BT[:, :-1]] = IGNORED
        first_BS = np.diff(documents_BS, axis=1, prepend=documents_BS[:, :1]) != 0
        positions_BS = place_BS - np.maximum.accumulate(np.where(first_BS, place_BS, 0), axis=1)
    else:
        documents_BS, positions_BS = np.zeros_like(tokens_BS), place_BS
    arrays = (tokens_BS, labels_BS, positions_BS, documents_BS)
    return Batch(*(torch.from_numpy(np.array(array, dtype=np.int64, order="C")) for array in arrays))
