"""Matrix multiplies on the CPU: one weight, or one weight per expert.

A processor without bf16 units multiplies bf16 matrices at a tenth of its fp32 rate, and ``g @ w`` at a hundredth.
There the operands are widened to fp32, multiplied, and the result rounded once, which is also more exact.

Shape suffixes: T rows, E experts, O output, I input.
"""

from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends import processor
from backends.weight_gradients import accumulate, deliver


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply in: ``dtype`` itself where the processor is fast at it, else fp32."""
    if dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and processor.multiplies_bf16()):
        return dtype
    return torch.float32


WIDE_RESULTS = ("cuda", "npu")
"""Devices whose ``mm`` gives operands of 16 bits a result in fp32."""


def product(a: Tensor, b: Tensor, wide: torch.dtype, result: torch.dtype) -> Tensor:
    """``a @ b`` through ``wide``; in ``result`` where the device gives narrow operands a wide result, else in wide."""
    if (
        a.device.type in WIDE_RESULTS and result == torch.float32 and a.dtype == b.dtype != result and a.dtype.itemsize == 2
    ):
        return torch.mm(a, b, out_dtype=result)
    return torch.mm(a.to(wide), b.to(wide))


def _multiply(a: Tensor, b: Tensor, wide: torch.dtype, out: Tensor, beta: int = 0) -> None:
    """``out = beta * out + a @ b`` through ``wide``; an expert's matrices stay in the cache while they are widened."""
    if out.dtype == wide:
        torch.addmm(out, a.to(wide), b.to(wide), beta=beta, out=out)
    else:
        accumulate(out, product(a, b, wide, out.dtype), beta)


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` through ``wide``, rounded once to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor], wide: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.wide = weight, wide
        return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], None]:
        x, weight = ctx.saved_tensors
        wide = ctx.wide
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_TO, x_TI = grad.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            grad_x = torch.mm(grad_TO.to(wide), weight.to(wide)).to(x.dtype).view_as(x)
        if wants_weight:
            grad_weight = deliver(ctx.weight, lambda out, beta: _multiply(grad_TO.T, x_TI, wide, out, beta))
        if wants_bias:
            grad_bias = grad_TO.to(wide).sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor], wide: torch.dtype) -> Tensor:
    """See :meth:`backends.operations.Operations.linear`; ``wide`` is the dtype to multiply in."""
    return _Linear.apply(x, weight, bias, wide)


def _occupied(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and their rows."""
    end = 0
    for expert, count in enumerate(counts):
        start, end = end, end + count
        if count:
            yield expert, slice(start, end)


class _GroupedMM(torch.autograd.Function):
    """A multiply per expert into its slice of the result, which beats torch's grouped operator on the CPU.

    Above all in the weight gradient, where that operator reaches a quarter of the rate with 64 experts.
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_EOI: Tensor, counts: list[int], wide: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TI, weight_EOI)
        ctx.weight, ctx.counts, ctx.wide = weight_EOI, counts, wide
        result = x_TI.new_empty(x_TI.shape[0], weight_EOI.shape[1])
        for expert, rows in _occupied(counts):
            _multiply(x_TI[rows], weight_EOI[expert].T, wide, result[rows])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Optional[Tensor], Optional[Tensor], None, None]:
        x_TI, weight_EOI = ctx.saved_tensors
        wide, counts = ctx.wide, ctx.counts
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x_TI)
            for expert, rows in _occupied(counts):
                _multiply(grad_TO[rows], weight_EOI[expert], wide, grad_x[rows])
        if ctx.needs_input_grad[1]:

            def write(out_EOI: Tensor, beta: int) -> None:
                for expert, rows in _occupied(counts):
                    _multiply(grad_TO[rows].T, x_TI[rows], wide, out_EOI[expert], beta)
                for expert, count in enumerate(counts):
                    if not count and not beta:
                        out_EOI[expert].zero_()

            grad_weight = deliver(ctx.weight, write)
        return grad_x, grad_weight, None, None


def grouped_mm(x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor, wide: torch.dtype) -> Tensor:
    """See :meth:`backends.operations.Operations.grouped_mm`; ``wide`` is the dtype to multiply in."""
    return _GroupedMM.apply(x_TI, weight_EOI, counts_E.tolist(), wide)
