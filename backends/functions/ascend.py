"""Autograd functions on operators of torch_npu that have no gradient of their own, or one that costs more.

Shape suffixes: T rows, E experts, O output, I input, B batch, S sequence, N heads, D head size.
"""

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends.functions.rows import accumulation_dtype
from backends.weight_gradients import accumulate, deliver


def _each_group(x_TI: Tensor, weight_EIO: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix -> (T, O). The weight may be a transposed view."""
    if weight_EIO.shape[0] == 1 or not x_TI.shape[0]:  # the operator takes neither one group nor no rows
        return torch.mm(x_TI, weight_EIO[0])
    if not (weight_EIO.is_contiguous() or weight_EIO.transpose(1, 2).is_contiguous()):
        weight_EIO = weight_EIO.contiguous()  # MLA over compressed vectors multiplies with slices
    (result,) = torch.ops.npu.npu_grouped_matmul(
        [x_TI.contiguous()], [weight_EIO], group_list=counts_E, split_item=3, group_type=0, group_list_type=1
    )
    return result


def _between_groups(a_TO: Tensor, b_TI: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows of a, transposed, times its rows of b -> (E, O, I); zeros where it has none."""
    if counts_E.shape[0] == 1 or not a_TO.shape[0]:
        return torch.mm(a_TO.T, b_TI).expand(counts_E.shape[0], -1, -1)
    (result,) = torch.ops.npu.npu_grouped_matmul(
        [a_TO.contiguous().T],
        [b_TI.contiguous()],
        group_list=counts_E,
        split_item=3,
        group_type=2,
        group_list_type=1,
    )
    # What a group of no rows gives is documented nowhere.
    return result.masked_fill_((counts_E == 0).view(-1, 1, 1), 0)


class _GroupedMM(torch.autograd.Function):
    """``npu_grouped_matmul``, whose weight gradient goes where :func:`deliver` brings it."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, weight_EOI, counts_E)
        ctx.weight = weight_EOI
        return _each_group(x_TI, weight_EOI.transpose(1, 2), counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Optional[Tensor], Optional[Tensor], None]:
        x_TI, weight_EOI, counts_E = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _each_group(grad_TO, weight_EOI, counts_E)
        if ctx.needs_input_grad[1]:

            def write(out_EOI: Tensor, beta: int) -> None:
                accumulate(out_EOI, _between_groups(grad_TO, x_TI, counts_E), beta)

            grad_weight = deliver(ctx.weight, write)
        return grad_x, grad_weight, None


class _AddExpertBias(torch.autograd.Function):
    """The gradient is a grouped multiply with a column of ones: torch_npu has no kernel for ``segment_reduce``."""

    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, bias_EO: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E)
        ctx.dtype = bias_EO.dtype
        return y_TO + torch.repeat_interleave(bias_EO, counts_E, dim=0, output_size=y_TO.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None]:
        (counts_E,) = ctx.saved_tensors
        wide = grad_TO.to(accumulation_dtype(grad_TO.dtype))
        sums_EO1 = _between_groups(wide, wide.new_ones(wide.shape[0], 1), counts_E)
        return grad_TO, sums_EO1.squeeze(2).to(ctx.dtype), None


class _Rotary(torch.autograd.Function):
    """``npu_rotary_mul`` in fp32 with the leading dimensions folded; its transpose turns the other way."""

    @staticmethod
    def forward(ctx: Any, x_BSND: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.mode = mode
        return _rotate(x_BSND, cos, sin, mode)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSND: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_BSND, cos, -sin, ctx.mode), None, None, None


def _rotate(x_BSND: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """Tables (1, B·S, 1, D), as wide as what is turned; the rest of a head stays."""
    turns = cos.shape[-1]
    x = x_BSND[..., :turns].to(cos.dtype).flatten(0, 1).unsqueeze(0)
    turned = torch.ops.npu.npu_rotary_mul(x, cos, sin, mode).view(*x_BSND.shape[:3], turns).to(x_BSND.dtype)
    return turned if turns == x_BSND.shape[-1] else torch.cat([turned, x_BSND[..., turns:]], -1)


def grouped_mm(x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """See :meth:`backends.operations.Operations.grouped_mm`."""
    return _GroupedMM.apply(x_TI, weight_EOI, counts_E)


def add_expert_bias(y_TO: Tensor, bias_EO: Tensor, counts_E: Tensor) -> Tensor:
    """See :meth:`backends.operations.Operations.add_expert_bias`."""
    return _AddExpertBias.apply(y_TO, bias_EO, counts_E)


def rotary(x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
    """See :meth:`backends.operations.Operations.rotary`."""

    def table(values_BSR: Tensor) -> Tensor:
        """One value for each dimension of the pair, and one sequence: modes differ in the batches that they take."""
        values = values_BSR.float().expand(x_BSND.shape[0], -1, -1).flatten(0, 1)
        both = values.repeat_interleave(2, -1) if interleaved else values.repeat(1, 2)
        return both.unflatten(0, (1, -1)).unsqueeze(2)

    mode = "interleave" if interleaved else "half"
    return _Rotary.apply(x_BSND, table(cos_BSR), table(sin_BSR), mode)
