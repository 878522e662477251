"""The CPU: the definition of every operation, which the other backends are checked against.

Shape suffixes as in ``backends/operations.py``.
"""

from typing import Optional

import torch
from torch import Tensor

from backends import peak, processor
from backends.base import Backend, MemoryStats, Slot
from backends.functions import attention, cross_entropy, elementwise, matmul, rows
from backends.operations import ExpertOrder, Operations


class CpuOperations(Operations):
    """Every operation on CPU tensors."""

    def linear(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        return matmul.linear(x, weight, bias, matmul.computing_dtype(x.dtype))

    def grouped_mm(self, x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        return matmul.grouped_mm(x_TI, weight_EOI, counts_E, matmul.computing_dtype(x_TI.dtype))

    def sort_by_expert(self, experts_TK: Tensor, num_experts: int, dropping: bool = True) -> ExpertOrder:
        return rows.sort_by_expert(experts_TK, num_experts, dropping)

    def permute(self, x_TH: Tensor, order: ExpertOrder) -> Tensor:
        return rows.permute(x_TH, order)

    def unpermute(self, y_PH: Tensor, order: ExpertOrder, weights_TK: Tensor) -> Tensor:
        return rows.unpermute(y_PH, order, weights_TK)

    def take_rows(self, x_PH: Tensor, index_P: Tensor, inverse_P: Tensor) -> Tensor:
        return rows.take_rows(x_PH, index_P, inverse_P)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return elementwise.rms_norm(x, weight, eps)

    def add_expert_bias(self, y_PO: Tensor, bias_EO: Tensor, counts_E: Tensor) -> Tensor:
        return rows.add_expert_bias(y_PO, bias_EO, counts_E)

    def swiglu(self, gate_up: Tensor, limit: Optional[float] = None) -> Tensor:
        return elementwise.swiglu(gate_up, limit)

    def rotary(self, x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
        return elementwise.rotary(x_BSND, cos_BSR, sin_BSR, interleaved)

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
        return attention.attention(q_BSND, k_BLMD, v_BLMW, scale, documents_BL, window, sinks_N)

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
        processor.share_cores()

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
        slow_bf16 = "" if self.native(torch.bfloat16) else "bf16 computes through fp32: no bf16 units here"
        return {
            "linear": Slot("torch mm", slow_bf16),
            "grouped_mm": Slot("torch mm per expert", slow_bf16),
            "sort_by_expert": Slot("stable argsort"),
            "permute": Slot("gather"),
            "unpermute": Slot("embedding_bag"),
            "take_rows": Slot("gather"),
            "rms_norm": Slot("own autograd function"),
            "add_expert_bias": Slot("repeat, segment sum"),
            "swiglu": Slot("own autograd function"),
            "rotary": Slot("own autograd function"),
            "attention": Slot("blocks of queries on bmm"),
            "linear_cross_entropy": Slot("chunks of tokens", slow_bf16),
        }
