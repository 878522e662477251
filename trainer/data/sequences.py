"""What every reader of training or validation sequences has in common: one global order, and a place in it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.errors import UserError
from trainer.data.batch import Batch, make_batch


@dataclass(frozen=True)
class Order:
    """Everything that decides which sequence comes when; a saved place has a meaning only in the same order.

    Attributes:
        streaming: documents as they come, or a packed corpus.
        tokenizer: its fingerprint.
        corpus: fingerprint of the documents.
        sequence_length: tokens of a sequence.
        shuffle_seed: seed of the shuffling, None when nothing is shuffled.
    """

    streaming: bool
    tokenizer: str
    corpus: str
    sequence_length: int
    shuffle_seed: int | None


class SequenceReader(ABC):
    """Sequences of one half of the corpus, in an order that does not depend on the layout of the ranks.

    Args:
        order: see :class:`Order`.
        wraps: start another epoch, shuffled anew, when one is over (training), or stop (validation).
        reset_at_documents: see :func:`trainer.data.batch.make_batch`.
        where: the config file, for messages.

    Attributes:
        position: sequences consumed since the start of training or, for validation, since :meth:`restart`.
    """

    position: int = 0

    def __init__(self, order: Order, wraps: bool, reset_at_documents: bool, where: str) -> None:
        self.order, self.wraps, self.where = order, wraps, where
        self._reset_at_documents = reset_at_documents

    @property
    @abstractmethod
    def num_sequences(self) -> int | None:
        """Sequences of one epoch; None when streaming, where nobody knows."""

    @property
    @abstractmethod
    def extent(self) -> tuple[int, int] | None:
        """(documents, tokens) of the corpus; None when streaming."""

    @abstractmethod
    def restart(self) -> None:
        """Go back to the first sequence."""

    @abstractmethod
    def tokens(self, first_sequence: int, count: int) -> np.ndarray:
        """Tokens of ``count`` sequences from number ``first_sequence`` of the order on, wherever the reader stands.

        Returns an int64 array of shape (count, S + 1): a sequence and its next token. A reader that does not wrap
        returns fewer rows past its end. Streaming reads from the start of the stream for this.
        """

    @abstractmethod
    def _take(self, count: int, mine: range) -> tuple[np.ndarray, np.ndarray, int]:
        """Consume up to ``count`` sequences: (tokens_BT, documents_BT) of those in ``mine``, and how many there were.

        Called before ``position`` moves.
        """

    @abstractmethod
    def _place(self) -> dict[str, Any]:
        """What :meth:`_go_to` needs besides ``position``."""

    @abstractmethod
    def _go_to(self, position: int, place: dict[str, Any]) -> None:
        """Stand where a reader of the same order stood when it gave ``place``."""

    def read(self, count: int, mine: range) -> Batch:
        """Consume the next ``count`` sequences of the order and return this rank's share of them.

        Args:
            count: sequences consumed by all ranks together; every rank passes the same.
            mine: which of these, 0 to ``count`` - 1, to return.

        Returns:
            A batch of shape (len(mine), S). A reader that does not wrap returns only those of ``mine`` that are left,
            possibly none; ``position`` then says how many all ranks consumed.
        """
        assert not len(mine) or (min(mine) >= 0 and max(mine) < count), f"{mine} does not lie within {count} sequences"
        tokens_BT, documents_BT, taken = self._take(count, mine)
        self.position += taken
        return make_batch(tokens_BT, documents_BT, self._reset_at_documents)

    def state_dict(self) -> dict[str, Any]:
        """The place in the order, as JSON-serialisable values; the same on every rank."""
        return {"order": vars(self.order).copy(), "position": self.position, "place": self._place()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises UserError, and stays where it is, if that was in another order: other documents, tokenizer, sequence
        length, shuffling or seed.
        """
        keys = {
            "streaming": "data.streaming",
            "tokenizer": "data.tokenizer",
            "corpus": "data.paths",
            "sequence_length": "data.sequence_length",
            "shuffle_seed": "seed",
        }
        for name, key in keys.items():
            saved, ours = state["order"][name], getattr(self.order, name)
            if saved == ours:
                continue
            if name == "shuffle_seed" and None in (saved, ours):
                key, saved, ours = "data.shuffle", saved is not None, ours is not None
            if name == "corpus" and self.order.streaming:
                saved = ours = ""  # nothing a person could recognise
            was = (
                f"{saved} in the checkpoint and is {ours} now"
                if name not in ("tokenizer", "corpus")
                else (f"gives another {name} than the one of the checkpoint")
            )
            raise UserError(
                f"{self.where}: {key}: {was}; resume with what the checkpoint was trained on, or start anew"
            )
        self._go_to(state["position"], state["place"])
        self.position = state["position"]
