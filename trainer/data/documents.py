"""What a document is, and the two halves, training and validation, that a source is divided into."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, Protocol

_LOOKED_AT = 100_000  # documents among which both halves find one, unless the fraction is out of proportion


class Document(NamedTuple):
    """One text. ``name`` is the same on every machine and run; ``text`` is never empty."""

    name: str
    text: str


class DocumentStream(Protocol):
    """Documents one after another, resumable between any two of them."""

    def __iter__(self) -> Iterator[Document]: ...

    def __next__(self) -> Document: ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable place in front of the next document."""
        ...


class Source(Protocol):
    """Somewhere that documents come from."""

    def identity(self) -> str:
        """Cheap to compute here, and different whenever the documents may differ: the key of a cache."""
        ...

    def signature(self) -> str:
        """Like :meth:`identity`, but the same for copies of the documents on other machines: the key of a resume."""
        ...

    def open(self, state: dict[str, Any] | None = None) -> DocumentStream:
        """All documents in their fixed order, from ``state`` (of ``DocumentStream.state_dict``) on."""
        ...


def hash_of(name: str) -> int:
    """64 bits of a document's name, which alone decide whether it is held out."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def bound(names: Iterable[str], fraction: float) -> int:
    """Documents whose hash lies below this are held out: ``fraction`` of all hashes.

    Where that would give one half nothing, the bound moves just so far that each has a document. ``names`` are read
    until both have one, which takes few of them, or until there are too many to call the corpus small.
    """
    wanted = math.ceil(fraction * 2**64)
    smallest, largest, seen = 2**64, -1, 0
    for name in islice(names, _LOOKED_AT):
        smallest, largest, seen = min(smallest, hash_of(name)), max(largest, hash_of(name)), seen + 1
        if smallest < wanted <= largest:
            return wanted
    if smallest >= largest or seen == _LOOKED_AT:  # a single document or none cannot be divided
        return wanted
    return smallest + 1 if smallest >= wanted else largest


class Documents:
    """A source, or the half of it that is held out (``held_out=True``) or is not (``False``)."""

    def __init__(self, source: Source, fraction: float = 0.0, held_out: bool | None = None) -> None:
        self.source, self.fraction, self.held_out = source, fraction, held_out

    @property
    def half(self) -> str:
        """The half as text, for keys; empty for a whole source."""
        return "" if self.held_out is None else f"{'validation' if self.held_out else 'training'} {self.fraction!r}"

    def identity(self) -> str:
        """See :meth:`Source.identity`."""
        return fingerprint(self.source.identity(), self.half)

    def signature(self) -> str:
        """See :meth:`Source.signature`."""
        return fingerprint(self.source.signature(), self.half)

    def open(self, state: dict[str, Any] | None = None) -> DocumentStream:
        """The documents of this half, in the source's order, from ``state`` on."""
        stream = self.source.open(state)
        if self.held_out is None:
            return stream
        return _HalfStream(stream, lambda name: (hash_of(name) < self._bound) == self.held_out)

    @cached_property
    def _bound(self) -> int:
        return bound((document.name for document in self.source.open()), self.fraction)


class _HalfStream:
    def __init__(self, stream: DocumentStream, keep: Callable[[str], bool]) -> None:
        self._stream, self._keep = stream, keep

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        while True:
            document = next(self._stream)
            if self._keep(document.name):
                return document

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()


def fingerprint(*parts: object) -> str:
    """32 hexadecimal digits that stand for the ``repr`` of the parts."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
