"""Expert parallelism: tokens travel to the ranks that hold their experts and come back.

Shapes: T tokens here, K choices per token, P rows that left or stayed, Q rows that arrived, H hidden,
E experts of the layer, L = E / ep experts held here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from backends.operations import ExpertOrder, Operations
from parallel.clock import Clock
from parallel.topology import Axis


class ShardableExperts(Protocol):
    """Stacked experts that can keep a contiguous range of themselves."""

    total: int

    def shard(self, first: int, count: int) -> None:
        """Keep experts ``first`` to ``first + count - 1``; called before weights exist."""


class MoELayer(Protocol):
    """What this file asks of a Mixture-of-Experts layer."""

    experts: Any  # ShardableExperts; Any because nn.Module attributes are untyped
    dispatcher: Any
    dropping: bool


class Exchange:
    """All-to-all over the expert-parallel ranks.

    Args:
        forward, backward: the same ranks; two groups where a forward and a backward may run at once.
        clock: gets the span ``expert_all_to_all``.
    """

    def __init__(self, forward: Axis, backward: Axis, clock: Clock) -> None:
        self.axis, self._backward, self.clock = forward, backward, clock

    def _group(self) -> dist.ProcessGroup:
        """Recomputation runs the forward inside a backward pass: autograd is asked, not the caller."""
        in_backward = torch._C._current_graph_task_id() != -1
        return (self._backward if in_backward else self.axis).group

    def __call__(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Row counts to and from each rank; the rows that arrived, by source rank."""
        arrived = rows.new_empty(sum(receive), *rows.shape[1:])
        with self.clock.span("expert_all_to_all"):
            dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=self._group())
        return arrived

    def counts(self, going: Tensor) -> Tensor:
        """One row of ``going`` (ranks, ·) to each rank; what they sent, in the same shape."""
        coming = torch.empty_like(going)
        with self.clock.span("expert_all_to_all"):
            dist.all_to_all_single(coming, going, group=self._group())
        return coming


class _AllToAll(torch.autograd.Function):
    """Rows to and from every rank of a group; the gradient takes the same way back."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows: Tensor, send: list[int], receive: list[int], exchange: Exchange
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.exchange = send, receive, exchange
        return exchange(rows, send, receive)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        return ctx.exchange(grad, ctx.receive, ctx.send), None, None, None


@dataclass(frozen=True)
class _Journey:
    """What ``combine`` needs to bring rows home."""

    order: ExpertOrder
    weights_TK: Tensor
    send: list[int]  # rows that went to each rank
    receive: list[int]  # rows that came from each rank
    by_expert_Q: Tensor  # arrival position of each row once sorted by local expert
    by_arrival_Q: Tensor  # its inverse


class AllToAllDispatcher:
    """Dropless dispatch with variable splits: one exchange of counts, one of rows, and one back.

    Rows arrive sorted by source rank and then by expert; they are sorted by expert (stable: source ranks in order)
    so that every local expert sees one contiguous run.
    """

    def __init__(self, exchange: Exchange, num_experts: int, ops: Operations, dropping: bool) -> None:
        self.exchange, self.num_experts, self.ops, self.dropping = exchange, num_experts, ops, dropping

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, _Journey]:
        """Rows (Q, H) sorted by local expert, tokens per local expert (L,), and the way back."""
        order = self.ops.sort_by_expert(experts_TK, self.num_experts, self.dropping)
        going = order.counts_E.view(self.exchange.axis.size, -1)
        coming = self.exchange.counts(going)
        send, receive = torch.stack([going.sum(1), coming.sum(1)]).tolist()
        rows_QH = _AllToAll.apply(self.ops.permute(x_TH, order), send, receive, self.exchange)
        by_expert_Q, by_arrival_Q = _transposed(coming, sum(receive))
        journey = _Journey(order, weights_TK, send, receive, by_expert_Q, by_arrival_Q)
        return self.ops.take_rows(rows_QH, by_expert_Q, by_arrival_Q), coming.sum(0), journey

    def combine(self, y_QH: Tensor, state: _Journey) -> Tensor:
        """Weighted sum (T, H) of each token's K results."""
        y_QH = self.ops.take_rows(y_QH, state.by_arrival_Q, state.by_expert_Q)
        y_PH = _AllToAll.apply(y_QH, state.receive, state.send, self.exchange)
        return self.ops.unpermute(y_PH, state.order, state.weights_TK)


def _transposed(lengths_RL: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Index and its inverse that bring blocks of rows from the order of a matrix to that of its transpose.

    The counts say where every block goes: nothing is sorted (Ascend sorts integers on the host), and with ``total``,
    their sum, no device is waited for.
    """
    begins = lengths_RL.flatten().cumsum(0).view_as(lengths_RL) - lengths_RL
    lengths_LR = lengths_RL.T.contiguous()
    begins_LR = lengths_LR.flatten().cumsum(0).view_as(lengths_LR) - lengths_LR
    ahead_LR = begins.T - begins_LR  # how far a block lies behind where it is to go
    place = torch.arange(total, device=lengths_RL.device)
    index = place + ahead_LR.flatten().repeat_interleave(lengths_LR.flatten(), output_size=total)
    inverse = place - ahead_LR.T.flatten().repeat_interleave(lengths_RL.flatten(), output_size=total)
    return index, inverse


def shard_experts(layers: Iterable[MoELayer], axis: Axis, dispatcher: Callable[[MoELayer], Any]) -> None:
    """Give this rank its share of every layer's experts and let tokens travel.

    Args:
        dispatcher: makes that of a layer.
    """
    for layer in layers:
        total = layer.experts.total
        assert total % axis.size == 0, "validate_layout of the config comes first"
        layer.experts.shard(axis.rank * (total // axis.size), total // axis.size)
        layer.dispatcher = dispatcher(layer)
