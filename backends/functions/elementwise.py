"""RMSNorm, SwiGLU and rotary embedding: few passes over memory, exact gradients, fp32 inside.

Each saves its inputs and recomputes the cheap rest in the backward. Long tensors go through in blocks of rows, so
that what one operator writes is in the cache when the next reads it.

Shape suffixes: T rows, H hidden, I half of a SwiGLU input, B batch, S sequence, N heads, D head size,
R rotated dimensions halved.
"""

from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends.functions.rows import accumulation_dtype

_BLOCK_ELEMENTS = 2**19
_BLOCK_ROWS = 4096  # narrow rows: what is added up over a block must keep its digits


def _row_blocks(x_TH: Tensor) -> Iterator[slice]:
    step = min(max(1, _BLOCK_ELEMENTS // max(1, x_TH.shape[1])), _BLOCK_ROWS)
    for start in range(0, x_TH.shape[0], step):
        yield slice(start, start + step)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        wide = accumulation_dtype(x_TH.dtype)
        result = torch.empty(x_TH.shape, dtype=weight_H.dtype, device=x_TH.device)
        rstd_T1 = torch.empty(x_TH.shape[0], 1, dtype=wide, device=x_TH.device)
        weight = weight_H.to(wide)
        for rows in _row_blocks(x_TH):
            x = x_TH[rows].to(wide)
            rstd = torch.linalg.vecdot(x, x).unsqueeze_(1).div_(x.shape[1]).add_(eps).rsqrt_()
            rstd_T1[rows] = rstd
            torch.mul(x * rstd, weight, out=result[rows])
        ctx.save_for_backward(x_TH, weight_H, rstd_T1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TH, weight_H, rstd_T1 = ctx.saved_tensors
        wide = rstd_T1.dtype
        weight = weight_H.to(wide)
        grad_x = torch.empty_like(x_TH)
        grad_weight = torch.zeros_like(weight)
        for rows in _row_blocks(x_TH):
            x, grad, rstd = x_TH[rows].to(wide), grad_TH[rows].to(wide), rstd_T1[rows]
            product = grad * x
            # y = x·r·w with r = (mean x² + eps)^-1/2, so dx = r·w·dy - x·r³·mean(x·w·dy) and dw = sum(r·x·dy).
            # A sum of its own for each block: added to one by one, the whole would lose two digits in 100,000 rows.
            grad_weight.add_(torch.mv(product.T, rstd.squeeze(1)))
            share = torch.mv(product, weight).unsqueeze_(1).mul_(rstd**3).div_(x.shape[1])
            result = torch.mul(grad, weight, out=product).mul_(rstd)
            torch.addcmul(result, x, share, value=-1, out=grad_x[rows])
        return grad_x, grad_weight.to(weight_H.dtype), None


_SLOPE = 1.702  # of the sigmoid in gpt-oss's clamped SwiGLU


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: Optional[float]) -> Tensor:
        wide = accumulation_dtype(gate_up.dtype)
        result = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        for rows in _row_blocks(gate_up):
            gate, up = gate_up[rows].to(wide).chunk(2, -1)
            if limit is None:
                torch.mul(torch.nn.functional.silu(gate), up, out=result[rows])
            else:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                torch.mul(torch.sigmoid(_SLOPE * gate).mul_(gate), up.add_(1), out=result[rows])
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        wide = accumulation_dtype(gate_up.dtype)
        grad_gate_up = torch.empty_like(gate_up)
        half, limit = grad_TI.shape[1], ctx.limit
        for rows in _row_blocks(gate_up):
            gate, up = gate_up[rows].to(wide).chunk(2, -1)
            grad, into = grad_TI[rows].to(wide), grad_gate_up[rows]
            if limit is None:
                sigmoid = torch.sigmoid(gate)
                silu = gate * sigmoid
                slope = torch.addcmul(silu, silu, sigmoid, value=-1).add_(sigmoid).mul_(up)  # s + g·s·(1 - s)
            else:
                gate_inside, up_inside = gate <= limit, up.abs() <= limit
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1)
                sigmoid = torch.sigmoid(_SLOPE * gate)
                silu = gate * sigmoid
                # s + a·g·s·(1 - s), the derivative of g·s with s = sigmoid(a·g)
                slope = torch.addcmul(silu, silu, sigmoid, value=-1).mul_(_SLOPE).add_(sigmoid).mul_(up)
                slope.mul_(gate_inside)  # nothing flows through what was clamped
                silu.mul_(up_inside)
            torch.mul(slope, grad, out=into[:, :half])
            torch.mul(silu, grad, out=into[:, half:])
        return grad_gate_up, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_BSR, sin_BSR)
        ctx.interleaved = interleaved
        return _rotate(x_BSND, cos_BSR, sin_BSR, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSND: Tensor) -> tuple[Tensor, None, None, None]:
        cos_BSR, sin_BSR = ctx.saved_tensors
        return _rotate(grad_BSND, cos_BSR, -sin_BSR, ctx.interleaved), None, None, None  # a rotation's transpose


def _rotate(x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
    half = cos_BSR.shape[-1]
    wide = accumulation_dtype(x_BSND.dtype)
    result = torch.empty(x_BSND.shape, dtype=x_BSND.dtype, device=x_BSND.device)
    cos, sin = cos_BSR.to(wide).unsqueeze(2), sin_BSR.to(wide).unsqueeze(2)
    turned = x_BSND[..., : 2 * half].to(wide)
    if interleaved:
        pairs = turned.unflatten(-1, (half, 2)).contiguous()
        product = torch.view_as_complex(pairs) * torch.complex(cos, sin)
        result[..., : 2 * half] = torch.view_as_real(product).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        torch.addcmul(first * cos, second, sin, value=-1, out=result[..., :half])
        torch.addcmul(second * cos, first, sin, out=result[..., half : 2 * half])
    result[..., 2 * half :] = x_BSND[..., 2 * half :]
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :meth:`backends.operations.Operations.rms_norm`."""
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


def swiglu(gate_up: Tensor, limit: Optional[float] = None) -> Tensor:
    """See :meth:`backends.operations.Operations.swiglu`."""
    result = _SwiGLU.apply(gate_up.reshape(-1, gate_up.shape[-1]), limit)
    return result.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def rotary(x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
    """See :meth:`backends.operations.Operations.rotary`."""
    return _Rotary.apply(x_BSND, cos_BSR, sin_BSR, interleaved)
