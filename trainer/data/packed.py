"""Sequences of a packed corpus, permuted anew in each epoch."""

from typing import Any

import numpy as np

from trainer.data.packing import PackedCorpus
from trainer.data.sequences import Order, SequenceReader


def permutation(count: int, seed: int, *which: int) -> np.ndarray:
    """A permutation of 0 to ``count`` - 1 that depends on the arguments and on no global state."""
    words = [seed % 2**64, *which]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words))).permutation(count)


class PackedReader(SequenceReader):
    """Reads :class:`PackedCorpus`. Sequence i of an epoch is the slice of S + 1 tokens at i * S."""

    def __init__(self, corpus: PackedCorpus, order: Order, wraps: bool, reset_at_documents: bool, where: str) -> None:
        super().__init__(order, wraps, reset_at_documents, where)
        self._corpus = corpus
        self._count = corpus.num_sequences(order.sequence_length)
        self._permuted: tuple[int, np.ndarray] | None = None  # the last epoch's

    @property
    def num_sequences(self) -> int:
        return self._count

    @property
    def extent(self) -> tuple[int, int]:
        return len(self._corpus.starts_D), len(self._corpus.tokens_N)

    def restart(self) -> None:
        self.position = 0

    def tokens(self, first_sequence: int, count: int) -> np.ndarray:
        return self._rows(first_sequence + np.arange(count))[0]

    def _take(self, count: int, mine: range) -> tuple[np.ndarray, np.ndarray, int]:
        taken = count if self.wraps else min(count, self._count - self.position)
        return *self._rows(self.position + np.array(mine, dtype=np.int64)), taken

    def _rows(self, numbers_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the sequences with these numbers in the order, counted over all epochs."""
        if not self.wraps:
            numbers_B = numbers_B[numbers_B < self._count]
        epochs_B, sequences_B = np.divmod(numbers_B, self._count)
        if self.order.shuffle_seed is not None:
            for epoch in np.unique(epochs_B):
                inside = epochs_B == epoch
                sequences_B[inside] = self._permutation(int(epoch))[sequences_B[inside]]
        return self._corpus.rows(sequences_B, self.order.sequence_length)

    def _permutation(self, epoch: int) -> np.ndarray:
        assert self.order.shuffle_seed is not None
        if self._permuted is None or self._permuted[0] != epoch:
            self._permuted = epoch, permutation(self._count, self.order.shuffle_seed, epoch)
        return self._permuted[1]

    def _place(self) -> dict[str, Any]:
        return {}

    def _go_to(self, position: int, place: dict[str, Any]) -> None:
        pass  # the position says it all
