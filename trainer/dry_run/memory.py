"""An account of the memory that tensors hold: bytes of live storages by category, and what they were at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "buffers", "temporary")


@dataclass
class _Storage:
    """One block of memory that tensors share."""

    bytes: int
    born: int  # storages seen before it
    passes: int  # backward passes begun before it
    in_backward: bool
    category: str | None = None  # said by name; None: what the storage's life tells
    watch: weakref.ref[torch.UntypedStorage] | None = None


class Memory:
    """Sees storages come, and learns from torch when they go.

    What nobody has put into a category is "activations" if a forward pass made it and it was still there in a later
    backward pass: what autograd saves, and hidden states on their way. Otherwise it is "temporary": gradients of
    activations, what a checkpointed layer computes again, and whatever a pass needs for a moment.
    """

    def __init__(self) -> None:
        self._live: dict[int, _Storage] = {}
        self._gone: list[tuple[str, int]] = []  # were there at the peak, and are not any more
        self._seen = 0
        self._peak_at = 0  # storages seen when the peak was reached
        self.now = self.peak = 0  # bytes
        self._pass = -1
        self._passes = 0

    def see(self, tensor: Tensor) -> None:
        """Count the tensor's storage, if it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or tensor.is_meta or not (size := storage.nbytes()):
            return
        running = torch._C._current_graph_task_id()
        if running not in (-1, self._pass):
            self._pass = running
            self._passes += 1
        self._seen += 1
        entry = _Storage(size, self._seen, self._passes, running != -1)
        entry.watch = weakref.ref(storage, lambda _: self._lose(key))
        self._live[key] = entry
        self.now += size
        if self.now > self.peak:
            self.peak, self._peak_at = self.now, self._seen
            self._gone.clear()

    def _lose(self, key: int) -> None:
        entry = self._live.pop(key)
        self.now -= entry.bytes
        if entry.born <= self._peak_at:
            self._gone.append((self._category(entry), entry.bytes))

    def _category(self, entry: _Storage) -> str:
        if entry.category is not None:
            return entry.category
        return "activations" if not entry.in_backward and entry.passes < self._passes else "temporary"

    def put(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Say what the storages of these tensors are; the first word on a storage holds."""
        for tensor in tensors:
            entry = self._live.get(tensor.untyped_storage()._cdata)
            if entry is not None and entry.category is None:
                entry.category = category

    def forget_peak(self) -> None:
        """Let the peak begin again at what is there now."""
        self.peak, self._peak_at = self.now, self._seen
        self._gone.clear()

    def at_peak(self) -> dict[str, int]:
        """Bytes by category when :attr:`peak` was reached; call it when all is over."""
        found = dict.fromkeys(CATEGORIES, 0)
        there = [(self._category(entry), entry.bytes) for entry in self._live.values() if entry.born <= self._peak_at]
        for category, size in [*there, *self._gone]:
            found[category] += size
        return found
