"""Which backend this process uses, and what `moebius info` says of the others."""

import os
from typing import Any

import torch

from backends.ascend import AscendBackend
from backends.ascend_state import ascend_problem
from backends.base import DTYPES, Backend, Slot
from backends.cpu import CpuBackend
from backends.cuda import CudaBackend, cuda_problem
from backends.errors import UserError

NAMES = ("cpu", "cuda", "ascend")
_ACCELERATED: dict[str, type[CudaBackend] | type[AscendBackend]] = {"cuda": CudaBackend, "ascend": AscendBackend}


def select(name: str = "auto") -> Backend:
    """The backend of this process.

    Args:
        name: cpu, cuda, ascend, or auto: the accelerator that torch finds, else the CPU.

    Raises:
        UserError: the name is unknown, or the backend is not available here.
    """
    if name == "auto":
        name = _found()
    if name not in NAMES:
        raise UserError(f"backend: there is no {name!r}; use auto, {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    problem = _problem(name)
    if problem:
        raise UserError(f"backend: {name!r} is not available here ({problem[0]}); {problem[1]}")
    backend: Backend = CpuBackend() if name == "cpu" else _ACCELERATED[name](_local_rank())
    for variable, value in backend.environment().items():
        os.environ.setdefault(variable, value)  # before the first allocation and the first cuBLAS call
    return backend


def _problem(name: str) -> tuple[str, str] | None:
    """Why a backend cannot run here and what to do about it; None when it can."""
    if name == "cuda":
        return cuda_problem()
    if name == "ascend":
        return ascend_problem()
    return None


def _found() -> str:
    """The accelerator that is here, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type == "cuda":
        return "cuda"
    return "cpu" if ascend_problem() else "ascend"


def _local_rank() -> int:
    """This process's place on its machine, as torchrun and the deepspeed launcher set it.

    Raises:
        UserError: LOCAL_RANK is no number, or there are fewer devices than ranks.
    """
    text = os.environ.get("LOCAL_RANK", "0")
    count = torch.accelerator.device_count()
    if not text.isdigit() or int(text) >= count:
        raise UserError(f"LOCAL_RANK={text}: this machine has {count} devices; start at most {count} ranks on it")
    return int(text)


def describe_all() -> list[dict[str, Any]]:
    """One record a backend: name, available, reason (why not), and operations: slot -> implementation and fallback.

    Where it is not available these are what would serve on its best device, or nothing. Where it is, there are also
    device, dtypes, native dtypes, distributed_backend, peak_flops by dtype, and memory in bytes.
    """
    records = []
    for name in NAMES:
        problem = _problem(name)
        record: dict[str, Any] = {"name": name, "available": problem is None, "reason": ""}
        if problem:
            record["reason"] = f"{problem[0]}; {problem[1]}"
            record["operations"] = _operations(_ACCELERATED[name].planned())
        else:
            record |= _describe(select(name))
        records.append(record)
    return records


def _operations(slots: dict[str, Slot]) -> dict[str, dict[str, str]]:
    return {
        slot: {"implementation": served.implementation, "fallback": served.fallback} for slot, served in slots.items()
    }


def _describe(backend: Backend) -> dict[str, Any]:
    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    dtypes = [dtype for dtype in DTYPES if backend.supports(dtype)]
    memory = backend.memory()
    return {
        "device": backend.device_name,
        "dtypes": [short(dtype) for dtype in dtypes],
        "native": [short(dtype) for dtype in dtypes if backend.native(dtype)],
        "distributed_backend": backend.distributed_backend,
        "operations": _operations(backend.slots()),
        "peak_flops": {short(dtype): backend.peak_flops(dtype) for dtype in dtypes},
        "memory": {"allocated": memory.allocated, "peak": memory.peak, "total": memory.total},
    }
