"""Runs what torch_npu would send to an NPU on the host: values, and torch_npu's own gradient formulas, without CANN's
kernels.

The memory of a simulated NPU is the host's (cann/runtime.c). So an operator runs on CPU tensors that share it: those of
``aten`` as torch's CPU kernels, those of ``npu`` as the reference code of operators.py. Everything above stays the
real thing: schemas, dispatcher, autograd, allocator, streams. An operator of ``aten`` for which torch_npu has no
kernel is refused, because on an NPU it would quietly run on the host, and so is a dtype that its kernels do not take.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.ascend.operators import Refused, reference

NPU = "PrivateUse1"
_EXPLICIT = "CompositeExplicitAutograd"
# torch_npu runs these itself: they only look at sizes and strides, ask for memory, or say who uses it.
_METADATA = {"aten::empty", "aten::empty_strided", "aten::detach", "aten::alias", "aten::lift_fresh"}
_METADATA |= {"aten::record_stream"}
_MULTIPLIES = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::baddbmm_", "aten::addmm_", "aten::mv"}
_MULTIPLIES |= {"aten::addmv", "aten::addmv_", "aten::matmul", "aten::linear", "aten::dot"}


class HostExecutor(TorchDispatchMode):
    """A context in which NPU tensors compute.

    Attributes:
        called: how often each operator ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, namespace = func._schema.name, func.namespace
        flat, _ = tree_flatten((args, kwargs))
        device = next((x.device for x in flat if _on_npu(x)), None)
        asked = kwargs.get("device")
        kind = None if asked is None else torch.device(asked).type
        if kind == "meta" or (device is None and kind != "npu"):
            return func(*args, **kwargs)
        if namespace == "aten" and (func.is_view or name in _METADATA):
            return func(*args, **kwargs)
        self.called[name] = self.called.get(name, 0) + 1
        written = reference(func.name())
        if written is not None:
            return self._on_host(written, func, args, kwargs, device)
        if namespace == "npu":
            raise NotImplementedError(f"{func} has no reference in tests/ascend/operators.py")
        if namespace == "aten":
            self._check(func, flat)
            if _has_kernel(func.name(), _EXPLICIT) and not _has_kernel(func.name(), NPU):
                with self:  # it is made of other operators, which are looked at in their turn
                    return func._op_dk(getattr(torch._C.DispatchKey, _EXPLICIT), *args, **kwargs)
        return self._on_host(func, func, args, kwargs, device)

    def _check(self, func: Any, flat: list[Any]) -> None:
        name = func._schema.name
        if not (_has_kernel(func.name(), NPU) or _has_kernel(func.name(), _EXPLICIT) or _structured(func)):
            raise Refused(f"{func}: torch_npu has no kernel for it")
        if name in _MULTIPLIES and any(_on_npu(x) and x.dtype == torch.float64 for x in flat):
            raise Refused(f"{func}: an NPU multiplies no fp64 matrices")

    def _on_host(self, compute: Callable[..., Any], func: Any, args: tuple, kwargs: dict, device: Any) -> Any:
        """``compute`` on CPU tensors that share the memory; what it returns, on the NPU."""
        originals: dict[int, Tensor] = {}

        def down(x: Any) -> Any:
            if _on_npu(x):
                alias = on_host(x)
                originals[id(alias)] = x
                keep.append(alias)
                return alias
            return x

        keep: list[Tensor] = []  # ids stay unique while these live
        host_args, host_kwargs = tree_map(down, (args, kwargs))
        target = device
        if host_kwargs.get("device") is not None:
            target = torch.device(host_kwargs["device"])
            host_kwargs["device"] = torch.device("cpu")
            target = torch.device("npu", torch.npu.current_device()) if str(target) == "npu" else target
        host_kwargs.pop("pin_memory", None)
        result = compute(*host_args, **host_kwargs)

        def up(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in originals:  # written in place
                original = originals[id(x)]
                return original if original.shape == x.shape else original.resize_(x.shape)
            return x if target is None or target.type == "cpu" else _up(x, target)

        if func.namespace == "c10d":
            return tree_map(lambda x: originals.get(id(x), x), result)
        return tree_map(up, result)


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _structured(func: Any) -> bool:
    """Whether torch makes it of a form with ``out=``, and torch_npu has one of those."""
    base = func._schema.name.removesuffix("_")
    packet = getattr(torch.ops.aten, base.partition("::")[2])
    forms = [f"{base}.{overload}" for overload in packet.overloads() if "out" in overload]
    return _has_kernel(func.name(), _EXPLICIT + "NonFunctional") and any(_has_kernel(form, NPU) for form in forms)


def _on_npu(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "npu"


def on_host(x: Tensor) -> Tensor:
    """A CPU tensor over the memory of ``x``, which it keeps alive."""
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    memory.owner = x.detach()
    shared = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(shared, x.storage_offset(), x.shape, x.stride())


def _up(x: Tensor, device: torch.device) -> Tensor:
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    on_host(there).copy_(x)
    return there
