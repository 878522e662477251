"""NVIDIA GPUs, on plain torch operators. The operations hold no CUDA call of their own: they run on any device.

Shape suffixes as in ``backends/operations.py``.
"""

from contextlib import suppress
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends import peak
from backends.base import DTYPES, Backend, MemoryStats, Slot
from backends.cpu import CpuOperations
from backends.functions import flex, matmul, rows
from backends.functions.compiled import CannotCompile, Compiled
from backends.functions.rows import accumulation_dtype
from backends.operations import ExpertOrder
from backends.plain import PlainOperations
from backends.weight_gradients import accumulate, deliver

_PLAIN = PlainOperations()
_ALIGNED = 8  # elements: the rows that F.grouped_mm reads must begin at multiples of 16 bytes


class CudaOperations(CpuOperations):
    """Where torch has a fused operator it is used; the rest is the CPU's definition, which runs on any device.

    Args:
        grouped_kernel: whether ``F.grouped_mm`` has a kernel of its own here.
    """

    def __init__(self, grouped_kernel: bool = True) -> None:
        self.grouped_kernel = grouped_kernel
        # A kernel each, forward and backward, in fp32 inside: as written they would be a pass for each operator.
        self.compiled_swiglu, self.compiled_rotary = Compiled(_wide_swiglu), Compiled(_PLAIN.rotary)

    def linear(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        return matmul.linear(x, weight, bias, x.dtype)

    def grouped_mm(self, x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        # Elsewhere F.grouped_mm waits for the counts and multiplies expert by expert. Ours does so for all dtypes and
        # sizes, and adds a narrow weight gradient up in fp32.
        aligned = all(size % _ALIGNED == 0 for size in weight_EOI.shape[1:])
        if self.grouped_kernel and x_TI.dtype == torch.bfloat16 and aligned and x_TI.shape[0]:
            return _GroupedMM.apply(x_TI.contiguous(), weight_EOI, counts_E.cumsum(0).to(torch.int32))
        return matmul.grouped_mm(x_TI, weight_EOI, counts_E, x_TI.dtype)

    def sort_by_expert(self, experts_TK: Tensor, num_experts: int, dropping: bool = True) -> ExpertOrder:
        return rows.sort_without_waiting(experts_TK, num_experts, dropping)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype == weight.dtype:
            return F.rms_norm(x, weight.shape, weight, eps)
        wide = accumulation_dtype(x.dtype)
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(weight.dtype)

    def swiglu(self, gate_up: Tensor, limit: Optional[float] = None) -> Tensor:
        return self.compiled_swiglu.otherwise(super().swiglu if limit is not None else _swiglu, gate_up, limit)

    def rotary(self, x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
        return self.compiled_rotary.otherwise(super().rotary, x_BSND, cos_BSR, sin_BSR, interleaved)

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
        special = documents_BL is not None or sinks_N is not None or 0 < window < k_BLMD.shape[1]
        if special and flex.serves(q_BSND, k_BLMD):
            with suppress(CannotCompile):
                return flex.attention(q_BSND, k_BLMD, v_BLMW, scale, documents_BL, window, sinks_N)
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


def _wide_swiglu(gate_up: Tensor, limit: Optional[float]) -> Tensor:
    return _PLAIN.swiglu(gate_up.to(accumulation_dtype(gate_up.dtype)), limit).to(gate_up.dtype)


def _swiglu(gate_up: Tensor, _no_limit: None) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


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
        self.ops: CudaOperations = CudaOperations(grouped_kernel=_has_grouped_kernel(self.capability))
        # fp32 is fp32, and sums of 16-bit products are fp32 until they are done.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    @property
    def capability(self) -> tuple[int, int]:
        """NVIDIA's compute capability, as (9, 0) for Hopper."""
        return torch.cuda.get_device_capability(self.device)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in DTYPES

    def native(self, dtype: torch.dtype) -> bool:
        major, _ = self.capability
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
        return _slots(self.ops, self.capability)

    @classmethod
    def planned(cls) -> dict[str, Slot]:
        return _slots(CudaOperations(), (9, 0))


def _has_grouped_kernel(capability: tuple[int, int]) -> bool:
    """Whether ``F.grouped_mm`` runs as one kernel: torch 2.13 has it for Hopper and for data-centre Blackwell."""
    return capability[0] in (9, 10)


def _slots(ops: CudaOperations, capability: tuple[int, int]) -> dict[str, Slot]:
    """What serves each operation on a device of that capability, and why where it is not the usual."""
    narrow = "" if capability >= (8, 0) else "bf16 is emulated: compute capability below 8.0"
    grouped = Slot("F.grouped_mm", "mm per expert in fp32 and fp16, and where a size is no multiple of 8")
    if not ops.grouped_kernel:
        here = f"{capability[0]}.{capability[1]}"
        grouped = Slot("mm per expert", f"F.grouped_mm has no kernel for compute capability {here}")

    def compiled(function: Compiled, otherwise: str) -> Slot:
        return Slot(otherwise, function.problem) if function.problem else Slot("torch.compile")

    flexible = "flex_attention with documents, windows or sinks; in fp32 and under 128 positions a mask instead"
    if flex.compiled_attention.problem:
        flexible = f"with a mask for documents and windows, in blocks for sinks: {flex.compiled_attention.problem}"
    return {
        "linear": Slot("F.linear", narrow),
        "grouped_mm": grouped,
        "sort_by_expert": Slot("stable sort, searchsorted"),
        "permute": Slot("gather"),
        "unpermute": Slot("embedding_bag in fp32, a gather per choice in bf16 and fp16"),
        "take_rows": Slot("gather"),
        "rms_norm": Slot("F.rms_norm"),
        "add_expert_bias": Slot("repeat, segment sum"),
        "swiglu": compiled(ops.compiled_swiglu, "F.silu times up"),
        "rotary": compiled(ops.compiled_rotary, "own autograd function"),
        "attention": Slot("F.scaled_dot_product_attention", flexible),
        "linear_cross_entropy": Slot("chunks of tokens"),
    }
