"""What one forward pass hands to every layer besides the hidden states."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model.cache import Cache


@dataclass(frozen=True)
class Share:
    """What sums over this micro-batch are divided by: the size of the *global* batch.

    Every loss is a sum over tokens or sequences divided by these, so that losses and gradients of all ranks and
    micro-batches simply add up to those of one process that sees the whole batch.
    """

    tokens: float  # labels that count, over all ranks and micro-batches
    sequences: float


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass; every stage of a pipeline has it."""

    tokens_BS: Tensor
    positions_BS: Tensor
    documents_BS: Tensor | None  # attention stays inside equal values; None: each row is one document
    labels_BS: Tensor | None  # the token to predict at each position, -100 where none is; None asks for logits
    share: Share
    cache: Cache | None = None  # what these tokens follow; for inference


class Meters:
    """Running sums of detached scalars and of tokens per expert, in the units of :class:`Share`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def count(self, layer: str, tokens_E: Tensor) -> None:
        self.counts[layer] = self.counts[layer] + tokens_E if layer in self.counts else tokens_E

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sums and counts since the last call."""
        taken = self.sums, self.counts
        self.sums, self.counts = {}, {}
        return taken


@dataclass
class Context:
    """Positions, documents and bookkeeping of one forward pass. Shapes: B batch, S sequence, R rotated dims."""

    cos_BSR: Tensor  # (B, S, R/2)
    sin_BSR: Tensor
    documents_BS: Tensor | None  # attention stays inside a document; None: one document a row
    share: Share
    meters: Meters
    recording: bool = True
    cache: Cache | None = None

    def silent(self) -> "_Silence":
        """Recomputation under activation checkpointing runs inside this: nothing is counted twice."""
        return _Silence(self)


class _Silence:
    """Can be entered again, unlike a generator: backward may pass a checkpoint several times."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.before: list[bool] = []

    def __enter__(self) -> None:
        self.before.append(self.context.recording)
        self.context.recording = False

    def __exit__(self, *_error: object) -> None:
        self.context.recording = self.before.pop()


class _Attach(torch.autograd.Function):
    """Identity on the first input; the second, a scalar loss, joins the graph with gradient 1."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.loss_like = loss.new_ones(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        return grad, ctx.loss_like


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """``x``, with ``loss`` (a scalar already divided by its global share) added to what backward differentiates.

    A layer can so contribute a loss from any pipeline stage, where the last stage's loss never sees it.
    """
    return _Attach.apply(x, loss)
