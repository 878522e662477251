"""Moving rows to their experts and back: gathers in both directions, never a scatter.

Shape suffixes: T tokens, K choices per token, P rows, H hidden, E experts, O output.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends.operations import ExpertOrder


def sort_by_expert(experts_TK: Tensor, num_experts: int, dropping: bool) -> ExpertOrder:
    """A stable sort of the choices; entries equal to ``num_experts`` come last and are cut off."""
    flat = experts_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    if dropping:
        rows = int(counts.sum())
        order = order[:rows]
        inverse = torch.where(flat < num_experts, inverse, -1)
    return ExpertOrder(order, inverse.view_as(experts_TK), counts)


def sort_without_waiting(experts_TK: Tensor, num_experts: int, dropping: bool) -> ExpertOrder:
    """The same for an accelerator, which ``bincount`` would have to wait for. Only ``dropping`` waits."""
    sorted_P, order_P = experts_TK.flatten().sort(stable=True)
    bounds_E = torch.searchsorted(sorted_P, torch.arange(num_experts, device=sorted_P.device), right=True)
    counts_E = bounds_E.diff(prepend=bounds_E.new_zeros(1))
    inverse_P = torch.empty_like(order_P)
    inverse_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    if dropping:
        rows = int(bounds_E[-1])
        order_P = order_P[:rows]
        inverse_P = torch.where(inverse_P < rows, inverse_P, -1)
    return ExpertOrder(order_P, inverse_P.view_as(experts_TK), counts_E)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum_choices(rows_PH: Tensor, order: ExpertOrder, weights_TK: Optional[Tensor]) -> Tensor:
    """Sum over k of ``weights[t, k] * rows[inverse[t, k]]`` -> (T, H), accumulated in fp32 or better."""
    inverse_TK, dtype = order.inverse_TK, rows_PH.dtype
    if rows_PH.shape[0] == 0:
        return rows_PH.new_zeros(inverse_TK.shape[0], rows_PH.shape[1])
    wide = accumulation_dtype(dtype)
    weights = None if weights_TK is None else weights_TK.to(wide)
    if order.dropped:
        kept_TK = inverse_TK >= 0
        weights = kept_TK.to(wide) if weights is None else weights * kept_TK
        inverse_TK = inverse_TK.clamp(min=0)
    if weights is None or dtype == wide:
        # One fused pass, which accumulates in fp32; it takes weights of the rows' dtype only.
        return F.embedding_bag(inverse_TK, rows_PH, mode="sum", per_sample_weights=weights)
    total = rows_PH.index_select(0, inverse_TK[:, 0]).to(wide).mul_(weights[:, :1])
    for k in range(1, order.top_k):
        total.addcmul_(rows_PH.index_select(0, inverse_TK[:, k]), weights[:, k : k + 1])
    return total.to(dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order: ExpertOrder) -> Tensor:
        ctx.order = order
        return x_TH.index_select(0, order.order_P // order.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(grad_PH, ctx.order, None), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PH: Tensor, order: ExpertOrder, weights_TK: Tensor) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(y_PH, weights_TK)
        return _sum_choices(y_PH, order, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, Optional[Tensor]]:
        y_PH, weights_TK = ctx.saved_tensors
        order = ctx.order
        wide = accumulation_dtype(y_PH.dtype)
        grad_PH = grad_TH.index_select(0, order.order_P // order.top_k).to(wide)
        grad_weights = None
        if ctx.needs_input_grad[2]:
            grad_weight_P = torch.linalg.vecdot(grad_PH, y_PH.to(wide)).to(weights_TK.dtype)
            grad_weights = weights_TK.new_zeros(weights_TK.numel())
            grad_weights = grad_weights.index_copy_(0, order.order_P, grad_weight_P).view_as(weights_TK)
        weight_P1 = weights_TK.reshape(-1, 1).index_select(0, order.order_P).to(wide)
        return grad_PH.mul_(weight_P1).to(y_PH.dtype), None, grad_weights


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PH: Tensor, index_P: Tensor, inverse_P: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_P)
        return x_PH.index_select(0, index_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor, None, None]:
        (inverse_P,) = ctx.saved_tensors
        return grad_PH.index_select(0, inverse_P), None, None


def permute(x_TH: Tensor, order: ExpertOrder) -> Tensor:
    """See :meth:`backends.operations.Operations.permute`."""
    return _Permute.apply(x_TH, order)


def unpermute(y_PH: Tensor, order: ExpertOrder, weights_TK: Tensor) -> Tensor:
    """See :meth:`backends.operations.Operations.unpermute`."""
    return _Unpermute.apply(y_PH, order, weights_TK)


def take_rows(x_PH: Tensor, index_P: Tensor, inverse_P: Tensor) -> Tensor:
    """See :meth:`backends.operations.Operations.take_rows`."""
    return _TakeRows.apply(x_PH, index_P, inverse_P)


class _AddExpertBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PO: Tensor, bias_EO: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E)
        ctx.dtype = bias_EO.dtype
        # The size is told, so that no device is waited for.
        return y_PO + torch.repeat_interleave(bias_EO, counts_E, dim=0, output_size=y_PO.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor, Tensor, None]:
        (counts_E,) = ctx.saved_tensors
        wide = grad_PO.to(accumulation_dtype(grad_PO.dtype)).contiguous()
        sums_EO = torch.segment_reduce(wide, "sum", lengths=counts_E, axis=0, initial=0)
        return grad_PO, sums_EO.to(ctx.dtype), None


def add_expert_bias(y_PO: Tensor, bias_EO: Tensor, counts_E: Tensor) -> Tensor:
    """See :meth:`backends.operations.Operations.add_expert_bias`."""
    return _AddExpertBias.apply(y_PO, bias_EO, counts_E)
