"""Expert parallelism by DeepEP (https://github.com/deepseek-ai/DeepEP), which has kernels over NVLink and RDMA.

A token travels once to each rank that holds one of its experts, not once per expert, and that rank adds its experts'
results up before it sends them home. So less travels, and a token's result is rounded to bf16 once for every rank
that it went to, where the all-to-all rounds it once.

The calls are those of ``deep_ep.Buffer``, which releases 1.1 to 2.1 have.

Shapes: T tokens here, K choices per token, R tokens that arrived, P rows of local experts, H hidden, L experts here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends.base import Backend
from backends.errors import UserError
from backends.operations import ExpertOrder, Operations
from parallel.clock import Clock
from parallel.topology import Axis


def check(backend: Backend, ranks: int, hidden: int, where: str) -> None:
    """Check what :class:`DeepEPExchange` needs of this machine and of a layout with ``ranks`` expert-parallel ranks.

    Raises:
        UserError: no CUDA, no DeepEP, or a number of ranks or a hidden size that its kernels do not serve.
    """
    problem = _problem(backend, ranks, hidden)
    if problem:
        raise UserError(f"{where}: parallel.dispatcher: deepep {problem[0]}; use all-to-all, or {problem[1]}")


def _problem(backend: Backend, ranks: int, hidden: int) -> tuple[str, str] | None:
    """What is wrong, and what would help."""
    if backend.name != "cuda":
        return f"has kernels for NVIDIA GPUs only, and the backend is {backend.name}", "a machine with such GPUs"
    try:
        _library().Buffer.get_dispatch_config(ranks)
    except ImportError as error:
        return f"cannot be imported ({error})", "install it from https://github.com/deepseek-ai/DeepEP"
    except AssertionError:
        return f"has no configuration for parallel.expert={ranks}", "parallel.expert=2, 4, 8, 16, 32 or 64"
    if hidden % 8:
        return f"copies 16 bytes at a time, and model.hidden_size={hidden}", "a multiple of 8"
    return None


def _library() -> Any:
    import deep_ep

    if getattr(deep_ep, "Buffer", None) is None:
        raise ImportError("it was built without deep_ep.Buffer")
    return deep_ep


class DeepEPExchange:
    """DeepEP's buffer of one expert-parallel group, and the four ways through it. All layers share one.

    Every call is one of all ranks of the group, in the same order. Tokens and results are bf16, weights fp32.

    Args:
        axis: the expert-parallel ranks, at least 2.
        hidden: H.
        clock: gets the span ``expert_all_to_all``.
    """

    def __init__(self, axis: Axis, hidden: int, clock: Clock) -> None:
        self.axis, self.clock = axis, clock
        library = _library()
        self._index_dtype = getattr(library, "topk_idx_t", torch.int64)
        buffer = library.Buffer
        needs = [buffer.get_dispatch_config(axis.size), buffer.get_combine_config(axis.size)]
        size = hidden * torch.bfloat16.itemsize
        self._buffer = buffer(
            axis.group,
            max(config.get_nvl_buffer_size_hint(size, axis.size) for config in needs),
            max(config.get_rdma_buffer_size_hint(size, axis.size) for config in needs),
        )

    def out(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> tuple[Any, ...]:
        """Tokens to the ranks of their experts.

        Args:
            experts_TK: numbers among ``num_experts``; -1 is no expert.

        Returns:
            tokens (R, H), numbers of local experts (R, K), -1 where an expert is not here, their weights (R, K), and
            the handle that the ways back take.
        """
        experts_TK = experts_TK.to(self._index_dtype)
        with self.clock.span("expert_all_to_all"):
            per_rank, per_node, per_expert, goes, _ = self._buffer.get_dispatch_layout(experts_TK, num_experts)
            x_RH, experts_RK, weights_RK, _, handle, _ = self._buffer.dispatch(
                x_TH.contiguous(),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=goes,
                num_tokens_per_expert=per_expert,
                topk_idx=experts_TK,
                topk_weights=weights_TK.contiguous(),
            )
        return x_RH, experts_RK, weights_RK, handle

    def out_again(self, x_TH: Tensor, handle: Any) -> Tensor:
        """Tokens (R, H), by the way that the handle's went."""
        with self.clock.span("expert_all_to_all"):
            return self._buffer.dispatch(x_TH.contiguous(), handle=handle)[0]

    def home(self, x_RH: Tensor, handle: Any, weights_RK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """For each token the sum of what its ranks have for it (T, H), and of what they have for its weights (T, K)."""
        if weights_RK is not None:
            weights_RK = weights_RK.contiguous()
        with self.clock.span("expert_all_to_all"):
            x_TH, weights_TK, _ = self._buffer.combine(x_RH.contiguous(), handle, topk_weights=weights_RK)
        return x_TH, weights_TK


class _Out(torch.autograd.Function):
    """:meth:`DeepEPExchange.out`; gradients of tokens and weights come home and are summed."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, num_experts: int, exchange: DeepEPExchange
    ) -> tuple[Any, ...]:
        x_RH, experts_RK, weights_RK, handle = exchange.out(x_TH, experts_TK, weights_TK, num_experts)
        ctx.exchange, ctx.handle = exchange, handle
        ctx.mark_non_differentiable(experts_RK)
        return x_RH, weights_RK, experts_RK, handle

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RH: Tensor, grad_RK: Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        grad_TH, grad_TK = ctx.exchange.home(grad_RH, ctx.handle, grad_RK)
        return grad_TH, grad_TK, None, None, None


class _Home(torch.autograd.Function):
    """:meth:`DeepEPExchange.home`; a token's gradient goes to every rank that had a part in it."""

    @staticmethod
    def forward(ctx, y_RH: Tensor, handle: Any, exchange: DeepEPExchange) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.exchange, ctx.handle = exchange, handle
        return exchange.home(y_RH, handle)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return ctx.exchange.out_again(grad_TH, ctx.handle), None, None


@dataclass(frozen=True)
class _Journey:
    """What ``combine`` needs to bring tokens home."""

    order: ExpertOrder  # of the tokens that arrived, by local expert
    weights_RK: Tensor
    handle: Any


class DeepEPDispatcher:
    """Tokens arrive once on a rank and are copied for its experts there; a rank weighs and sums its own results.

    Args:
        exchange: shared by all layers.
        num_experts: of the layer, on all ranks.
        dropping: whether some choices may have no expert.
    """

    def __init__(self, exchange: DeepEPExchange, num_experts: int, ops: Operations, dropping: bool) -> None:
        self.exchange, self.num_experts, self.ops, self.dropping = exchange, num_experts, ops, dropping
        self.held = num_experts // exchange.axis.size

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, _Journey]:
        """Rows (P, H) sorted by local expert, tokens per local expert (L,), and the way back."""
        if self.dropping:
            experts_TK = experts_TK.masked_fill(experts_TK == self.num_experts, -1)
        x_RH, weights_RK, experts_RK, handle = _Out.apply(
            x_TH, weights_TK.float(), experts_TK, self.num_experts, self.exchange
        )
        local_RK = experts_RK.long().masked_fill(experts_RK < 0, self.held)  # no row for the experts of other ranks
        order = self.ops.sort_by_expert(local_RK, self.held, True)
        return self.ops.permute(x_RH, order), order.counts_E, _Journey(order, weights_RK, handle)

    def combine(self, y_PH: Tensor, state: _Journey) -> Tensor:
        """Weighted sum (T, H) of each token's K results."""
        y_RH = self.ops.unpermute(y_PH, state.order, state.weights_RK)
        return _Home.apply(y_RH, state.handle, self.exchange)
