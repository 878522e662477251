"""What a backend is: one kind of device, what it can do, and its operations."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from backends.operations import Operations

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class MemoryStats:
    """Bytes: in use by this process now, at most since the last reset, and what the device has."""

    allocated: int
    peak: int
    total: int


@dataclass(frozen=True)
class Slot:
    """Which implementation serves one operation here, and why it is not the usual one (empty when it is)."""

    implementation: str
    fallback: str = ""


class Backend(ABC):
    """One kind of device. Made by :func:`backends.select`.

    Attributes:
        name: cpu, cuda or ascend.
        device: this process's device; the index is ``LOCAL_RANK`` where there are several.
        distributed_backend: the ``torch.distributed`` backend: gloo, nccl or hccl.
        deepspeed_accelerator: the value of ``DS_ACCELERATOR``.
        ops: the operations.
        fused_adamw: whether torch's fused AdamW runs on the device.
    """

    name: str
    device: torch.device
    distributed_backend: str
    deepspeed_accelerator: str
    ops: Operations
    fused_adamw: bool = True

    @property
    @abstractmethod
    def device_name(self) -> str:
        """The model of the device, as its maker calls it."""

    @abstractmethod
    def supports(self, dtype: torch.dtype) -> bool:
        """Whether a model can be trained in this dtype here."""

    @abstractmethod
    def native(self, dtype: torch.dtype) -> bool:
        """Whether the hardware multiplies matrices of this dtype at its full rate."""

    @abstractmethod
    def memory(self) -> MemoryStats:
        """Memory of this process on the device."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Let :meth:`memory` count its peak from now."""

    @abstractmethod
    def peak_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of dense matrix multiplies: the published figure where known, else the best measured here."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for the device."""

    @abstractmethod
    def slots(self) -> dict[str, Slot]:
        """The implementation behind each operation."""

    @classmethod
    def planned(cls) -> dict[str, Slot]:
        """:meth:`slots` on the best device of this kind; for `moebius info` where there is none."""
        return {}

    def group_options(self, axis: str) -> Any:
        """Options of the distributed backend for the process groups of one axis of the mesh: pp, edp, ep or dp.

        Returns:
            a new ``torch.distributed`` ``Backend.Options`` at each call, because torch writes into it; None for the
            default ones.
        """
        return None

    def set_deterministic(self, on: bool) -> None:
        """Refuse (or allow again) operations whose result varies from run to run.

        Raises:
            RuntimeError: later, by torch, from an operation that has no deterministic form.
        """
        torch.use_deterministic_algorithms(on)
        # Determinism does not need fresh memory to be filled with NaN, which torch does by default.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def environment(self) -> dict[str, str]:
        """Variables that a run needs; :func:`backends.select` sets those that the user has not."""
        return {"DS_ACCELERATOR": self.deepspeed_accelerator, "THP_MEM_ALLOC_ENABLE": "1"}
