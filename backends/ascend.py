"""Huawei Ascend NPUs, on the operators of torch_npu where their documented limits allow.

Every limit that an operation leaves is stated in :meth:`AscendBackend.slots`. docs/ascend.md says what has been tested
of this without an NPU, and what has not.

Shape suffixes as in ``backends/operations.py``.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import peak
from backends.ascend_state import ENVIRONMENT
from backends.base import Backend, MemoryStats, Slot
from backends.cpu import CpuOperations
from backends.functions import ascend, matmul, rows
from backends.functions.rows import accumulation_dtype
from backends.operations import ExpertOrder

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the operators of torch_npu
_MOST_GROUPS = 1024  # npu_grouped_matmul
_MOST_INDICES = 2**24 - 1  # npu_moe_token_permute sorts fewer
_MOST_CHOICES = 512
_LARGEST_HEAD = 768  # npu_fusion_attention
_COMPRESSED_MASK = 2048  # its size of the mask that sparse modes 2 to 4 want


def _fits(*tensors: Tensor) -> bool:
    """Whether torch_npu's operators take these together: one dtype of theirs, and something to do."""
    return len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in _DTYPES and tensors[0].numel() > 0


class AscendOperations(CpuOperations):
    """torch_npu's fused operators, and the CPU's definition, which runs on any device, for what they do not take."""

    def linear(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        return matmul.linear(x, weight, bias, x.dtype)

    def grouped_mm(self, x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        if len(counts_E) > _MOST_GROUPS:
            return matmul.grouped_mm(x_TI, weight_EOI, counts_E, x_TI.dtype)
        return ascend.grouped_mm(x_TI, weight_EOI, counts_E)

    def sort_by_expert(self, experts_TK: Tensor, num_experts: int, dropping: bool = True) -> ExpertOrder:
        return rows.sort_without_waiting(experts_TK, num_experts, dropping)

    def permute(self, x_TH: Tensor, order: ExpertOrder) -> Tensor:
        if order.dropped or not _fits(x_TH) or not _sortable(order):
            return super().permute(x_TH, order)
        # It sorts what it is given: the rows' own numbers bring each choice to its row.
        return torch.ops.npu.npu_moe_token_permute(x_TH, order.inverse_TK)[0]

    def unpermute(self, y_PH: Tensor, order: ExpertOrder, weights_TK: Tensor) -> Tensor:
        if order.dropped or not _fits(y_PH, weights_TK) or not _sortable(order):
            return super().unpermute(y_PH, order, weights_TK)
        return torch.ops.npu.npu_moe_token_unpermute(y_PH, order.inverse_TK.flatten().int(), weights_TK)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.dtype if x.dtype == weight.dtype else accumulation_dtype(x.dtype)
        if wide not in _DTYPES or not x.numel():
            return super().rms_norm(x, weight, eps)
        return torch.ops.npu.npu_rms_norm(x.to(wide), weight.to(wide), eps)[0].to(weight.dtype)

    def add_expert_bias(self, y_PO: Tensor, bias_EO: Tensor, counts_E: Tensor) -> Tensor:
        return ascend.add_expert_bias(y_PO, bias_EO, counts_E)

    def swiglu(self, gate_up: Tensor, limit: Optional[float] = None) -> Tensor:
        if limit is not None or not _fits(gate_up):
            return super().swiglu(gate_up, limit)
        return torch.ops.npu.npu_swiglu(gate_up, -1)

    def rotary(self, x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
        if not _fits(x_BSND):
            return super().rotary(x_BSND, cos_BSR, sin_BSR, interleaved)
        return ascend.rotary(x_BSND, cos_BSR, sin_BSR, interleaved)

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
        value_head = v_BLMW.shape[-1]
        head = max(q_BSND.shape[-1], value_head)
        if sinks_N is not None or head > _LARGEST_HEAD or not _fits(q_BSND, k_BLMD, v_BLMW):
            return super().attention(q_BSND, k_BLMD, v_BLMW, scale, documents_BL, window, sinks_N)
        # Keys and values have one shape: zero columns add nothing to a score, and give zero columns of the result.
        q, k, v = (F.pad(x, (0, head - x.shape[-1])) for x in (q_BSND, k_BLMD, v_BLMW))
        S, L = q.shape[1], k.shape[1]
        mask, mode, before = None, 0, 2**31 - 1
        if documents_BL is not None:
            mask, mode = _hidden(S, documents_BL, window), 1
        elif S > 1 or 0 < window < L:
            mask = torch.ones(_COMPRESSED_MASK, _COMPRESSED_MASK, dtype=torch.bool, device=q.device).triu_(1)
            mode, before = (4, window - 1) if 0 < window < L else (3, before)  # from the last query and key back
        result = torch.ops.npu.npu_fusion_attention(
            q,
            k,
            v,
            q.shape[2],
            "BSND",
            atten_mask=mask,
            scale=scale,
            pre_tockens=before,
            next_tockens=0 if mode == 4 else 2**31 - 1,
            sparse_mode=mode,
        )[0]
        return result[..., :value_head]


def _sortable(order: ExpertOrder) -> bool:
    return order.inverse_TK.numel() < _MOST_INDICES and order.top_k <= _MOST_CHOICES


def _hidden(S: int, documents_BL: Tensor, window: int) -> Tensor:
    """(B, 1, S, L), True where a query does not see a key."""
    L = documents_BL.shape[1]
    keys = torch.arange(L, device=documents_BL.device)
    queries = keys[L - S :, None]
    hidden = keys > queries
    if window:
        hidden = hidden | (keys <= queries - window)
    return (hidden | (documents_BL[:, L - S :, None] != documents_BL[:, None, :])).unsqueeze(1)


class AscendBackend(Backend):
    """One NPU. torch_npu is loaded before this is made (:func:`backends.ascend_state.ascend_problem`)."""

    name = "ascend"
    distributed_backend = "hccl"
    deepspeed_accelerator = "npu"

    def __init__(self, index: int) -> None:
        self.device = torch.device("npu", index)
        self._npu: Any = torch.get_device_module("npu")
        self._npu.set_device(self.device)
        self._npu.matmul.allow_hf32 = False  # HF32 keeps 10 bits of fp32's 23
        self._npu.conv.allow_hf32 = False
        self.ops = AscendOperations()

    @property
    def device_name(self) -> str:
        return self._npu.get_device_name(self.device)

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in _DTYPES  # its matrix units know no fp64

    def native(self, dtype: torch.dtype) -> bool:
        return self.supports(dtype)

    def memory(self) -> MemoryStats:
        _, total = self._npu.mem_get_info(self.device)
        return MemoryStats(self._npu.memory_allocated(self.device), self._npu.max_memory_allocated(self.device), total)

    def reset_peak_memory(self) -> None:
        self._npu.reset_peak_memory_stats(self.device)

    def peak_flops(self, dtype: torch.dtype) -> float:
        return peak.measured(self.device, self.device_name, dtype)

    def synchronize(self) -> None:
        self._npu.synchronize(self.device)

    def environment(self) -> dict[str, str]:
        return super().environment() | ENVIRONMENT

    def group_options(self, axis: str) -> Any:
        if axis not in ("pp", "ep"):
            return None
        from torch_npu._C._distributed_c10d import ProcessGroupHCCL

        options = ProcessGroupHCCL.Options()
        options.is_high_priority_stream = True  # a rank waits for what it is sent over these: they go ahead
        return options

    def slots(self) -> dict[str, Slot]:
        return self.planned()

    @classmethod
    def planned(cls) -> dict[str, Slot]:
        return {
            "linear": Slot("torch mm"),
            "grouped_mm": Slot("npu_grouped_matmul", "one local expert or no rows: torch mm"),
            "sort_by_expert": Slot("stable sort, searchsorted"),
            "permute": Slot("npu_moe_token_permute", "gather where choices are dropped (capacity_factor)"),
            "unpermute": Slot(
                "npu_moe_token_unpermute",
                "gather where choices are dropped, and in bf16 and fp16: the operator would round the fp32 weights",
            ),
            "take_rows": Slot("gather"),
            "rms_norm": Slot("npu_rms_norm"),
            "add_expert_bias": Slot("repeat, npu_grouped_matmul with ones"),
            "swiglu": Slot("npu_swiglu", "own autograd function where it is clamped (gpt-oss): no training operator"),
            "rotary": Slot("npu_rotary_mul in fp32"),
            "attention": Slot(
                "npu_fusion_attention",
                "sinks (gpt-oss) and heads above 768 run in blocks of queries on bmm: outside its documented use",
            ),
            "linear_cross_entropy": Slot("chunks of tokens"),
        }
