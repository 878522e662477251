"""The two parameterised primitives, and the dense feed-forward made of them. Parameters only: ops do the work."""

from typing import Any

import torch
from torch import Tensor, nn

from backends.functions.rows import accumulation_dtype
from backends.operations import Operations


class Linear(nn.Module):
    """y = x Wᵀ + b with W (out, in), through the backend's ``linear``."""

    def __init__(self, inputs: int, outputs: int, ops: Operations, bias: bool = False, **factory: Any) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory))
        self.bias = nn.Parameter(torch.empty(outputs, **factory)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (arXiv 1910.07467), statistics in fp32."""

    def __init__(self, size: int, eps: float, ops: Operations, **factory: Any) -> None:
        super().__init__()
        self.ops, self.eps = ops, eps
        self.weight = nn.Parameter(torch.empty(size, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """Dense gated feed-forward (arXiv 2002.05202): down(silu(gate x) * up x), gate and up in one weight."""

    def __init__(self, size: int, hidden: int, ops: Operations, **factory: Any) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up = Linear(size, 2 * hidden, ops, **factory)
        self.down = Linear(hidden, size, ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.ops.swiglu(self.gate_up(x)))


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 if it is fp64 already."""
    return x.to(accumulation_dtype(x.dtype))
