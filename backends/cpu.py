"""The CPU: the definition of every operation, which the other backends are checked against.

Shape suffixes: T tokens, K choices per token, P rows, E experts, H hidden, I input, O output, B batch, S sequence,
N query heads, M key/value heads, D query/key head size, W value head size, R rotated dimensions halved, V vocabulary.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import peak, processor
from backends.base import Backend, MemoryStats, Slot
from backends.functions import cross_entropy, rows
from backends.functions.rows import accumulation_dtype
from backends.operations import ExpertOrder, Operations


class CpuOperations(Operations):
    """Every operation on CPU tensors."""

    def linear(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        return F.linear(x, weight, bias)

    def grouped_mm(self, x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        parts = x_TI.split(counts_E.tolist())
        return torch.cat([part @ weight.T for part, weight in zip(parts, weight_EOI.unbind(0), strict=True)])

    def sort_by_expert(self, experts_TK: Tensor, num_experts: int, dropping: bool = True) -> ExpertOrder:
        return rows.sort_by_expert(experts_TK, num_experts, dropping)

    def permute(self, x_TH: Tensor, order: ExpertOrder) -> Tensor:
        return rows.permute(x_TH, order)

    def unpermute(self, y_PH: Tensor, order: ExpertOrder, weights_TK: Tensor) -> Tensor:
        return rows.unpermute(y_PH, order, weights_TK)

    def take_rows(self, x_PH: Tensor, index_P: Tensor, inverse_P: Tensor) -> Tensor:
        return rows.take_rows(x_PH, index_P, inverse_P)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(accumulation_dtype(x.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * weight).to(weight.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def rotary(self, x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
        half = cos_BSR.shape[-1]
        turned, rest = x_BSND[..., : 2 * half], x_BSND[..., 2 * half :]
        wide = turned.to(accumulation_dtype(x_BSND.dtype))
        pairs = wide.unflatten(-1, (half, 2) if interleaved else (2, half))
        pair_dim = -1 if interleaved else -2
        first, second = pairs.unbind(pair_dim)
        cos, sin = cos_BSR.unsqueeze(2), sin_BSR.unsqueeze(2)
        result = torch.stack((first * cos - second * sin, second * cos + first * sin), pair_dim).flatten(-2)
        return torch.cat((result.to(x_BSND.dtype), rest), -1)

    def attention(
        self, q_BSND: Tensor, k_BSMD: Tensor, v_BSMW: Tensor, scale: float, documents_BS: Optional[Tensor] = None
    ) -> Tensor:
        S = q_BSND.shape[1]
        mask = None
        if documents_BS is not None:
            same = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
            mask = (same & torch.ones(S, S, dtype=torch.bool, device=same.device).tril()).unsqueeze(1)
        return F.scaled_dot_product_attention(
            q_BSND.transpose(1, 2),
            k_BSMD.transpose(1, 2),
            v_BSMW.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q_BSND.shape[2] != k_BSMD.shape[2],
        ).transpose(1, 2)

    def linear_cross_entropy(self, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy.linear_cross_entropy(hidden_TH, weight_VH, labels_T)


class CpuBackend(Backend):
    """The processors of this machine."""

    name = "cpu"
    distributed_backend = "gloo"
    deepspeed_accelerator = "cpu"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.ops = CpuOperations()

    @property
    def device_name(self) -> str:
        return processor.model_name()

    def supports(self, dtype: torch.dtype) -> bool:
        # fp16 needs loss scaling and its matrix multiplies are far slower than any other's on a CPU.
        return dtype in (torch.float32, torch.float64, torch.bfloat16)

    def native(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and processor.multiplies_bf16())

    def memory(self) -> MemoryStats:
        return processor.memory()

    def reset_peak_memory(self) -> None:
        processor.reset_peak_memory()

    def peak_flops(self, dtype: torch.dtype) -> float:
        if not self.native(dtype):
            dtype = torch.float32  # which is what the operations compute through
        return peak.measured(self.device, self.device_name, dtype)

    def synchronize(self) -> None:
        """Nothing to wait for: CPU operators return when they are done."""

    def slots(self) -> dict[str, Slot]:
        return {}
