"""Where a weight's gradient goes, and when it is computed.

The backward of a matrix multiply gives its weight gradient to :func:`deliver`. That writes it straight into the
place where the optimizer reads it (:class:`GradientSlot`), without a gradient of its own in between, and may put the
computation off (:func:`deferred`): a zero-bubble pipeline (Qi et al. 2023, arXiv 2401.10241) sends the input
gradient on at once and computes weight gradients while it would wait.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor

Write = Callable[[Tensor, int], None]
"""``write(out, beta)``: out = beta * out + the gradient. With beta 0 what out held, NaN too, must not matter."""


class GradientSlot:
    """The place of one weight's gradient in an fp32 buffer. A weight that has one carries it as ``gradient_slot``.

    The first gradient of a step overwrites and the others add, so that nobody has to clear the buffer.

    Args:
        view: fp32, of the weight's shape.
    """

    def __init__(self, view: Tensor) -> None:
        self.view = view
        self.filled = False

    def write(self, write: Write) -> None:
        """Add what ``write`` computes."""
        write(self.view, int(self.filled))
        self.filled = True

    def add(self, grad: Tensor) -> None:
        """Add a gradient that is there already."""
        self.write(lambda out, beta: accumulate(out, grad, beta))

    def close(self) -> None:
        """End the step: a weight that took no part in it has the gradient zero. The next one overwrites."""
        if not self.filled:
            self.view.zero_()
        self.filled = False


class Store:
    """Weight gradients that are still to be computed, in the order of the backward pass."""

    def __init__(self) -> None:
        self._pending: deque[Callable[[], None]] = deque()

    def put(self, compute: Callable[[], None]) -> None:
        """Keep ``compute`` for :meth:`run`."""
        self._pending.append(compute)

    @torch.no_grad()
    def run(self) -> None:
        """Compute what is kept, and let go of the activations that it needed."""
        while self._pending:
            self._pending.popleft()()


_store: Optional[Store] = None  # of the process: on an accelerator backward runs in another thread than the caller


@contextmanager
def deferred() -> Iterator[Store]:
    """Inside, backward passes leave their weight gradients in the store. One thread at a time may be inside.

    Gradients of biases, norms and other weights that no matrix multiply owns are computed at once all the same.
    """
    global _store
    before, _store = _store, Store()
    try:
        yield _store
    finally:
        _store = before


def deliver(weight: Tensor, write: Write) -> Optional[Tensor]:
    """Bring a weight's gradient to its place.

    Args:
        weight: the operand itself, not one unpacked from ``ctx.saved_tensors``: checkpointing detaches those.
        write: computes the gradient, now or later.

    Returns:
        what the backward returns for the weight: None where the gradient goes into a slot or comes later.
    """
    slot: Optional[GradientSlot] = getattr(weight, "gradient_slot", None)
    # Only a leaf can take a gradient after its backward pass is over.
    if _store is not None and (slot is not None or weight.is_leaf):
        _store.put(lambda: slot.write(write) if slot is not None else _add_to_grad(weight, write))
        return None
    if slot is not None:
        slot.write(write)
        return None
    return _alone(weight, write)


def accumulate(out: Tensor, grad: Tensor, beta: int) -> None:
    """The end of a ``write`` whose gradient is a tensor of its own: out = beta * out + grad, in the dtype of out."""
    if beta:
        out.add_(grad)
    else:
        out.copy_(grad)


def _alone(weight: Tensor, write: Write) -> Tensor:
    grad = torch.empty_like(weight, requires_grad=False)
    write(grad, 0)
    return grad


def _add_to_grad(weight: Tensor, write: Write) -> None:
    if weight.grad is None:
        weight.grad = _alone(weight, write)
    else:
        weight.grad += _alone(weight, write)
