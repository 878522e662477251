"""A stream of its own for each stage of a rank, so that the kernels of two stages can run at once.

autograd runs a backward in the stream of its forward. So it is stages that get streams, not passes: a pair of DualPipeV
is of two stages. What other streams have made, a lane waits for when it begins, and they wait for it when it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Lane:
    """The stream that a stage's passes run in; without one of its own, the stream that they find.

    Args:
        stream: a ``torch.Stream`` of the device.
    """

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream

    def begin(self) -> None:
        """What comes in the lane waits for all that the current stream has by now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.accelerator.current_stream())

    def inside(self) -> AbstractContextManager[Any]:
        """What is launched inside goes into the lane. Between :meth:`begin` and :meth:`end`."""
        return nullcontext() if self._stream is None else self._stream

    def end(self) -> None:
        """What comes in the current stream waits for all that the lane has by now."""
        if self._stream is not None:
            torch.accelerator.current_stream().wait_stream(self._stream)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """The three together."""
        self.begin()
        try:
            with self.inside():
                yield
        finally:
            self.end()

    def take(self, tensor: Tensor | None) -> None:
        """Another lane's tensor is used in this one: its memory must not be given away before this one is through."""
        if self._stream is not None and tensor is not None:
            tensor.record_stream(self._stream)
