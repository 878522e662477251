"""Stands between the trainer and torch's fake tensors: sees every operation, and answers what a fake cannot tell.

Values that decide shapes or branches are the rows of each expert, where a block of attention meets other documents,
and whether a norm is finite. The answers: an even choice of experts, one document a sequence, and 1 for any number.
Integers that are known are real tensors and stay so; they are computed with, and everything else is fake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_impls import has_meta
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from trainer.dry_run.memory import Memory
from trainer.dry_run.traffic import Traffic

_ATEN = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """To be entered inside ``fakes``, which must allow inputs that are not fake."""

    def __init__(self, fakes: FakeTensorMode, memory: Memory, traffic: Traffic) -> None:
        super().__init__()
        self._fakes, self._memory, self._traffic = fakes, memory, traffic
        self._known: dict[Any, _Shapes] = {}
        self._attributes: dict[str, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper that would prevent it costs as much as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device
        result = self._answer(func, args, kwargs or {})
        if isinstance(result, Tensor):
            self._memory.see(result)
        elif isinstance(result, (tuple, list)):
            for tensor in _tensors(result):
                self._memory.see(tensor)
        return result

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.namespace == "c10d":
            with _disable_current_modes():
                return self._traffic.call(func, args)
        given: list[Tensor] = []
        key: list[Any] = [func, *kwargs]
        _scan(args, given, key)
        _scan(kwargs.values(), given, key)
        fake = [isinstance(tensor, FakeTensor) for tensor in given]
        if given and all(fake):
            result = self._of_fakes(func, args, kwargs, given, tuple(key))
            if isinstance(result, FakeTensor) and not any(tensor.dim() for tensor in (result, *given)):
                with _disable_current_modes():
                    result.number = func(*tree_map_only(Tensor, _number, args), **kwargs)  # type: ignore[attr-defined]
            return result
        if not any(fake) and _real(given, kwargs.get("device")):
            with _disable_current_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _of_fakes(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor], key: Any) -> Any:
        """What an operation on fakes gives: as FakeTensorMode says, in a fifth of its time."""
        if func is _ATEN._local_scalar_dense.default:
            with _disable_current_modes():
                return _number(args[0]).item()
        if func is _ATEN.bincount.default:
            with _disable_current_modes():
                return even_counts(args[0].numel(), args[2])
        if not _on_meta(func) or kwargs.get("device") not in (None, _CPU):
            return func(*args, **kwargs)
        known = self._known.get(key)
        if known is None:
            sizes = [tensor.shape for tensor in given]
            kwargs.pop("device", None)
            with in_kernel_invocation_manager(self._fakes):
                result = self._faked(func(*args, **kwargs))
            if _fresh(func) and sizes == [tensor.shape for tensor in given]:
                self._known[key] = _shapes(result, given)
            return result
        return self._again(known, given)

    def _again(self, known: Any, given: list[Tensor]) -> Any:
        """A result with the shapes of an earlier one."""
        if isinstance(known, int):
            return given[known]
        if isinstance(known, list):
            return tuple(self._again(part, given) for part in known)
        size, stride, dtype = known
        with torch._C._DisableTorchDispatch():
            made = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        return self._fake(made)

    def _faked(self, result: Any) -> Any:
        """What a kernel of the meta device gave, as fake tensors."""
        if isinstance(result, (tuple, list)):
            return type(result)(map(self._faked, result))
        if not isinstance(result, Tensor) or isinstance(result, FakeTensor):
            return result
        return self._fake(result)

    def _fake(self, meta: Tensor) -> Tensor:
        """What ``FakeTensor(...)`` makes, with attributes that are all the same made once."""
        made = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=_CPU)
        if not self._attributes:
            self._attributes = vars(FakeTensor(self._fakes, meta, device=_CPU)).copy()
        vars(made).update(self._attributes)
        return made


_Shapes = Any  # number of the argument that is the result; or size, stride and dtype; or a list of those


def _shapes(result: Any, given: list[Tensor]) -> _Shapes:
    if isinstance(result, (tuple, list)):
        return [_shapes(part, given) for part in result]
    for number, tensor in enumerate(given):
        if tensor is result:
            return number
    return result.shape, result.stride(), result.dtype


@cache
def _on_meta(func: Any) -> bool:
    """Whether torch finds the shapes of a result by the operation itself, on the meta device."""
    return func.namespace == "aten" and has_meta(func)


@cache
def _fresh(func: Any) -> bool:
    """Whether the results are new storages or arguments that stay what they are: no views, and tensors only."""
    returns = func._schema.returns
    fresh = [(part.alias_info is None or part.alias_info.is_write) and str(part.type) == "Tensor" for part in returns]
    return torch.Tag.inplace_view not in func.tags and bool(fresh) and all(fresh)


def _real(given: list[Tensor], device: torch.device | None) -> bool:
    """Whether an operation on tensors that are not fake is really done: on integers, and on a model's shapes."""
    if device is None:
        return bool(given) and all(tensor.is_meta or not tensor.is_floating_point() for tensor in given)
    return device.type == "meta"


def even_counts(choices: int, bins: int) -> Tensor:
    """(bins,): so many choices, as even as whole numbers can be; the last bin, of those that were dropped, is empty."""
    experts = bins - 1
    first = torch.arange(experts) < choices % experts
    return torch.cat([choices // experts + first.long(), torch.zeros(1, dtype=torch.int64)])


def _number(tensor: Tensor) -> Tensor:
    """The value of a fake without dimensions: 1 where nobody knows it, and what follows from such values."""
    known: Tensor | None = getattr(tensor, "number", None)
    return torch.ones((), dtype=tensor.dtype) if known is None else known


def _scan(values: Iterable[Any], given: list[Tensor], key: list[Any]) -> None:
    """The tensors among some arguments, and all that the shapes of a result depend on."""
    for value in values:
        if isinstance(value, Tensor):
            given.append(value)
            key.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (tuple, list)):
            key.append(len(value))
            _scan(value, given, key)
        else:
            key.append((type(value), value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
