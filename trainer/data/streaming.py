"""Sequences packed while documents come in, for a corpus too large, or too far away, to tokenize first."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from trainer.config.schema import DataConfig
from trainer.data.documents import Documents
from trainer.data.packed import permutation
from trainer.data.packing import encoded
from trainer.data.sequences import Order, SequenceReader
from trainer.data.sources import name_of, too_short
from trainer.data.tokenizer import Tokenizer

# Documents between two recorded places of the source: what a resumed run reads again at most.
WINDOW = 64
# The same when shuffling, which permutes the documents of a window.
SHUFFLED_WINDOW = 1024
_WINDOW_CHARACTERS = 16_000_000  # closes a window early, to bound memory

# Where a document lies: the source's state at its window, the window's number, the document's number within it (in
# reading order), and how many of its tokens are behind us.
_START: dict[str, Any] = {"source": None, "window": 0, "document": 0, "token": 0}


class StreamReader(SequenceReader):
    """Packs documents as they come; the same sequences as a packed corpus has when nothing is shuffled.

    Every rank walks the same stream from end to end and keeps its own sequences. That makes the order independent of
    the layout, at the price of reading and tokenizing everything on every rank.

    ``shuffle`` permutes the documents (not the sequences) inside consecutive windows of 1,024, by the seed, the epoch
    and the window, so that a resumed run reads one window again and then goes on exactly. Without it a window is 64.
    An epoch's last tokens that fill no sequence are dropped. A validation half that is held out by hash (rather than
    named in data.validation_paths) costs a walk over the training documents as well.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        order: Order,
        held_out: bool | None,
        config: DataConfig,
        where: str,
    ) -> None:
        super().__init__(order, held_out is False, config.reset_at_documents, where)
        self._documents, self._tokenizer, self._held_out, self._config = documents, tokenizer, held_out, config
        self._begin(0, _START)

    @property
    def num_sequences(self) -> None:
        return None

    @property
    def extent(self) -> None:
        return None

    def restart(self) -> None:
        self.position = 0
        self._begin(0, _START)

    def tokens(self, first_sequence: int, count: int) -> np.ndarray:
        fresh = StreamReader(self._documents, self._tokenizer, self.order, self._held_out, self._config, self.where)
        fresh._take(first_sequence, range(0))
        return fresh._take(count, range(count))[0]

    def _begin(self, epoch: int, place: dict[str, Any]) -> None:
        self._epoch, self._resumed = epoch, place
        self._coming = self._encoded_documents(epoch, place)
        # Documents not yet behind us: tokens, place, and a number that only has to differ between neighbours.
        self._pending: deque[tuple[np.ndarray, dict[str, Any], int]] = deque()
        self._behind = place["token"]  # tokens of the first of them that are behind us
        self._available = -self._behind
        self._number = self._taken = 0

    def _encoded_documents(self, epoch: int, place: dict[str, Any]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """(tokens, place) of the documents of an epoch in reading order, from ``place`` on."""
        stream = self._documents.open(place["source"])
        window, skipped = place["window"], place["document"]
        while True:
            source = stream.state_dict()
            texts, characters = [], 0
            for document in islice(stream, WINDOW if self.order.shuffle_seed is None else SHUFFLED_WINDOW):
                texts.append(document.text)
                characters += len(document.text)
                if characters >= _WINDOW_CHARACTERS:
                    break
            if not texts:
                return
            if self.order.shuffle_seed is not None:
                texts = [texts[i] for i in permutation(len(texts), self.order.shuffle_seed, epoch, window)]
            for number, tokens in enumerate(encoded(texts[skipped:], self._tokenizer), start=skipped):
                yield tokens, {"source": source, "window": window, "document": number, "token": 0}
            window, skipped = window + 1, 0

    def _fill(self, tokens: int) -> bool:
        """Have at least ``tokens`` tokens in front of us; False if the epoch ends before."""
        while self._available < tokens:
            following = next(self._coming, None)
            if following is None:
                return False
            self._pending.append((*following, self._number))
            self._number += 1
            self._available += len(following[0])
        return True

    def _take(self, count: int, mine: range) -> tuple[np.ndarray, np.ndarray, int]:
        length = self.order.sequence_length
        rows, taken = [], 0
        while taken < count:
            if not self._fill(length + 1):
                self._require_progress()
                if not self.wraps:
                    break
                self._begin(self._epoch + 1, _START)
                continue
            if taken in mine:
                rows.append(self._row(length + 1))
            self._advance(length)
            taken += 1
            self._taken += 1
        empty = np.zeros((0, length + 1), np.int64)
        return (
            np.stack([r[0] for r in rows]) if rows else empty,
            np.stack([r[1] for r in rows]) if rows else empty,
            taken,
        )

    def _row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The next ``length`` tokens and the numbers of their documents, both int64."""
        tokens_T, documents_T = np.empty(length, np.int64), np.empty(length, np.int64)
        filled, behind = 0, self._behind
        for tokens, _, number in self._pending:
            piece = tokens[behind : behind + length - filled]
            tokens_T[filled : filled + len(piece)] = piece
            documents_T[filled : filled + len(piece)] = number
            filled, behind = filled + len(piece), 0
            if filled == length:
                break
        return tokens_T, documents_T

    def _advance(self, length: int) -> None:
        self._behind += length
        self._available -= length
        while self._pending and self._behind >= len(self._pending[0][0]):
            self._behind -= len(self._pending.popleft()[0])

    def _require_progress(self) -> None:
        """Raise UserError if a whole epoch gave nothing: without this, a reader that wraps would never return."""
        if self._taken or self._resumed is not _START:
            return
        what = f"{name_of(self._held_out)} documents"
        raise too_short(what, self._held_out, self._config, self.where)

    def _place(self) -> dict[str, Any]:
        # Between two sequences at least the token that the last one predicted is in front of us.
        place = {**self._pending[0][1], "token": self._behind} if self._pending else self._resumed
        return {"epoch": self._epoch, **place}

    def _go_to(self, position: int, place: dict[str, Any]) -> None:
        self._begin(place["epoch"], {name: place[name] for name in _START})
