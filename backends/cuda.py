"""NVIDIA GPUs, on plain torch operators. The operations hold no CUDA call of their own: they run on any device.

Shape suffixes as in ``backends/operations.py``.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends import peak
from backends.base import DTYPES, Backend, MemoryStats, Slot
from backends.cpu import CpuOperations
from backends.functions import matmul
from backends.functions.rows import accumulation_dtype
from backends.weight_gradients import accumulate, deliver


class CudaOperations(CpuOperations):
    """Where torch has a fused operator it is used; the rest is the CPU's definition, which runs on any device."""

    def linear(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        return matmul.linear(x, weight, bias, x.dtype)

    def grouped_mm(self, x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        return _GroupedMM.apply(x_TI, weight_EOI, counts_E.cumsum(0).to(torch.int32))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype == weight.dtype:
            return F.rms_norm(x, weight.shape, weight, eps)
        wide = accumulation_dtype(x.dtype)
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(weight.dtype)

    def swiglu(self, gate_up: Tensor, limit: Optional[float] = None) -> Tensor:
        if limit is not None:
            return super().swiglu(gate_up, limit)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def attention(
        self,
        q_BSND: Tensor,
        k_BLMD: Tensor,
        v_BLMW: Tensor,
        scale: float,
        documents_BL: Optional[Tensor] = None,
        window: int = 0,
        sinks_N: Optional[Tensor] = None,
    ) -> Tensor:
        if sinks_N is not None:  # no fused kernel of torch takes them
            return super().attention(q_BSND, k_BLMD, v_BLMW, scale, documents_BL, window, sinks_N)
        q, k, v = (x.transpose(1, 2) for x in (q_BSND, k_BLMD, v_BLMW))
        head, value_head = q.shape[-1], v.shape[-1]
        if value_head < head:
            # The flash kernel wants one head size: zero columns of v give zero columns of the result.
            v = F.pad(v, (0, head - value_head))
        mask = _mask(q.shape[2], k.shape[2], documents_BL, window, q.device)
        causal = mask is None and q.shape[2] > 1  # one query sees all keys
        result = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return result.transpose(1, 2)[..., :value_head]


def _mask(S: int, L: int, documents_BL: Optional[Tensor], window: int, device: torch.device) -> Optional[Tensor]:
    """(B or 1, 1, S, L), True where a query may attend; None where the kernel's own causal mask says it all."""
    windowed = 0 < window < L
    if documents_BL is None and not windowed and S in (1, L):
        return None
    keys, queries = torch.arange(L, device=device), torch.arange(L - S, L, device=device)[:, None]
    seen = keys <= queries
    if windowed:
        seen &= keys > queries - window
    if documents_BL is None:
        return seen[None, None]
    return (seen & (documents_BL[:, L - S :, None] == documents_BL[:, None, :])).unsqueeze(1)


class _GroupedMM(torch.autograd.Function):
    """``F.grouped_mm`` whose weight gradient goes where :func:`deliver` brings it. ``ends_E`` is int32."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, weight_EOI, ends_E)
        ctx.weight = weight_EOI
        return F.grouped_mm(x_TI, weight_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Optional[Tensor], Optional[Tensor], None]:
        x_TI, weight_EOI, ends_E = ctx.saved_tensors
        grad_TO = grad_TO.contiguous()  # it refuses expanded gradients
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad_TO, weight_EOI, offs=ends_E)
        if ctx.needs_input_grad[1]:

            def write(out_EOI: Tensor, beta: int) -> None:
                accumulate(out_EOI, F.grouped_mm(grad_TO.T, x_TI, offs=ends_E), beta)

            grad_weight = deliver(ctx.weight, write)
        return grad_x, grad_weight, None


def cuda_problem() -> tuple[str, str] | None:
    """Why CUDA cannot be used here and what to do about it; None when it can."""
    if not torch.backends.cuda.is_built():
        return (
            "torch was built without CUDA",
            "use backend=cpu or install a CUDA build of torch (https://pytorch.org/get-started)",
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device", "use backend=cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


class CudaBackend(Backend):
    """One NVIDIA GPU."""

    name = "cuda"
    distributed_backend = "nccl"
    deepspeed_accelerator = "cuda"

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        torch.accelerator.set_device_index(index)
        self.ops = CudaOperations()

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in DTYPES

    def native(self, dtype: torch.dtype) -> bool:
        major = torch.cuda.get_device_capability(self.device)[0]
        return {torch.bfloat16: major >= 8, torch.float16: major >= 7, torch.float64: major >= 8}.get(dtype, True)

    def memory(self) -> MemoryStats:
        return MemoryStats(
            torch.accelerator.memory_allocated(self.device),
            torch.accelerator.max_memory_allocated(self.device),
            torch.cuda.get_device_properties(self.device).total_memory,
        )

    def reset_peak_memory(self) -> None:
        torch.accelerator.reset_peak_memory_stats(self.device)

    def peak_flops(self, dtype: torch.dtype) -> float:
        known = peak.published(self.device_name, dtype)
        return known if known else peak.measured(self.device, self.device_name, dtype)

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self.device)

    def environment(self) -> dict[str, str]:
        # cuBLAS is deterministic only with a fixed workspace; expandable segments fit varying expert loads.
        return super().environment() | {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }

    def group_options(self, axis: str) -> Any:
        if axis not in ("pp", "ep"):
            return None
        # A rank waits for what it is sent over these before it can compute on, so they go ahead of computation.
        return torch.distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)

    def slots(self) -> dict[str, Slot]:
        narrow = "" if self.native(torch.bfloat16) else "bf16 is emulated: compute capability below 8.0"
        return {
            "linear": Slot("F.linear", narrow),
            "grouped_mm": Slot("F.grouped_mm", narrow),
            "sort_by_expert": Slot("stable argsort"),
            "permute": Slot("gather"),
            "unpermute": Slot("embedding_bag"),
            "take_rows": Slot("gather"),
            "rms_norm": Slot("F.rms_norm"),
            "add_expert_bias": Slot("repeat, segment sum"),
            "swiglu": Slot("F.silu times up", "torch has no fused SwiGLU"),
            "rotary": Slot("own autograd function", "torch has no fused rotary embedding"),
            "attention": Slot("F.scaled_dot_product_attention", "sinks (gpt-oss) run in blocks of queries on bmm"),
            "linear_cross_entropy": Slot("chunks of tokens"),
        }
