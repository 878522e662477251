"""How exact an operation is on a device: its error against the definition in fp64, beside the error of plain torch.

An operation is run three times, forward and backward, on the same rounded inputs and the same random gradient: on
the device in the dtype in question, by the definition (``backends/cpu.py``) in fp64, and by the textbook formula
(``backends/plain.py``) in the same dtype. The last two run on the CPU, so that a broken device cannot excuse itself.
What is left of an operation's error beside that of plain torch is its own doing, whatever the dtype and the shape.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backends.cpu import CpuOperations
from backends.operations import Operations
from backends.plain import PlainOperations

Run = Callable[..., Any]
"""``run(ops, *inputs)`` calls one operation, or a few, and returns a tensor, a tuple or a dataclass of tensors."""

FACTOR = {torch.float16: 4.0, torch.bfloat16: 4.0, torch.float32: 8.0, torch.float64: 8.0}
"""How many times the error of plain torch passes. Right ways to add up the same terms differ by up to three times in
their largest error, and libraries' exponentials by as much again, which shows in fp32. A missing term, or a narrow
dtype where a wide one is meant, costs hundreds of ulps; a narrow sum of eight terms more than four times."""

ROUNDING = {"max_ulps": 0.5, "mean_ulps": 0.25}
"""What one rounding of the result may cost, which is what plain torch is taken for where it does better. Twice that in
fp32, where what went before is rounded as coarsely: the exponential of a score, say, that plain torch does without."""

CANCELLED = 8.0
"""The size of a sum of dozens of random terms of size 1, before it cancels: as the gradient of scores with one key."""


@dataclass(frozen=True)
class Errors:
    """What one tensor lacks of its reference.

    Relative errors are shares of the reference's root mean square. An ulp is the distance of neighbouring numbers of
    the tensor's dtype at the reference's entry, or at its root mean square for entries below that: where terms
    cancel, nobody can be exact to the ulps of what is left. Where all of it cancels and the reference is 0, errors
    are counted at ``CANCELLED``. All are 0 (the cosine 1) for a tensor without entries.
    """

    max_relative: float
    mean_relative: float
    max_ulps: float
    mean_ulps: float
    cosine: float

    @classmethod
    def of(cls, tensor: Tensor, reference: Tensor) -> "Errors":
        """The errors of ``tensor`` (any dtype and device) against an fp64 tensor of its shape."""
        ours, reference = tensor.detach().cpu().double(), reference.detach()
        if not reference.numel():
            return cls(0.0, 0.0, 0.0, 0.0, 1.0)
        error = (ours - reference).abs()
        if not error.any():
            return cls(0.0, 0.0, 0.0, 0.0, 1.0)
        rms = reference.square().mean().sqrt().item() or CANCELLED
        at = reference.abs().clamp(min=rms)
        ulps = error / (torch.finfo(tensor.dtype).eps * torch.exp2(at.log2().floor()))
        relative = error / rms
        cosine = torch.cosine_similarity(ours.flatten(), reference.flatten(), dim=0, eps=0.0)
        return cls(*(x.item() for x in (relative.max(), relative.mean(), ulps.max(), ulps.mean(), cosine)))


@dataclass(frozen=True)
class Finding:
    """One output or one gradient.

    Attributes:
        name: ``output``, the field of a dataclass, or ``gradient of`` an input.
        errors, plain: here, and of the plain formula in the same dtype on the CPU. None for what is no floating
            tensor, which has to be equal.
        problem: one clause that says what is wrong; empty where nothing is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    errors: Errors | None
    plain: Errors | None
    problem: str

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem

    @property
    def share(self) -> float:
        """The error as a share of the largest that passes; infinite for what is wrong in another way."""
        if self.errors is None or self.plain is None:
            return 0.0 if self.passed else math.inf
        dtype = getattr(torch, self.dtype)
        shares = (
            getattr(self.errors, what) / (FACTOR[dtype] * ordinary)
            for what, ordinary in _ordinary(self.plain, dtype).items()
        )
        return max(math.inf if math.isnan(share) else share for share in shares)


def measure(
    run: Run, inputs: Mapping[str, Any], dtype: torch.dtype, ops: Operations, device: torch.device, seed: int = 0
) -> list[Finding]:
    """Compare an operation of ``ops`` on ``device`` with its definition.

    Args:
        run: the call. It must not depend on anything random.
        inputs: what it is given after the operations, on the CPU. fp64 tensors are rounded to ``dtype``; other ones,
            as routing weights in fp32 or indices, keep theirs. Those that require a gradient are differentiated by.
        dtype: float32, bfloat16 or float16.
        seed: of the gradients that the outputs are given.

    Returns:
        one finding for each output and each gradient, in the order of the outputs and inputs.
    """
    rounded = {name: _rounded(value, dtype) for name, value in inputs.items()}
    cpu = torch.device("cpu")
    plain = _forward_and_backward(run, rounded, PlainOperations(), cpu, seed, {})
    dtypes = {name: value.dtype for name, value in plain.items() if isinstance(value, Tensor)}
    wide = {name: _widened(value) for name, value in rounded.items()}
    expected = _forward_and_backward(run, wide, CpuOperations(), cpu, seed, dtypes)
    ours = _forward_and_backward(run, rounded, ops, device, seed, dtypes)
    return [_finding(name, ours[name], value, plain[name]) for name, value in expected.items()]


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    is_wide = isinstance(value, Tensor) and value.dtype == torch.float64
    return value.detach().to(dtype).requires_grad_(value.requires_grad) if is_wide else value


def _widened(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double().requires_grad_(value.requires_grad) if is_float else value


def _forward_and_backward(
    run: Run,
    inputs: Mapping[str, Any],
    ops: Operations,
    device: torch.device,
    seed: int,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Any]:
    """Outputs and gradients by name. ``dtypes`` are those to which the gradients of outputs are rounded first."""
    given = {
        name: value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    outputs = _named(run(ops, *given.values()))
    generator = torch.Generator().manual_seed(2**31 + seed)  # whoever drew the inputs may have begun with the seed
    differentiable, gradients = [], []
    for name, output in outputs.items():
        if isinstance(output, Tensor) and output.requires_grad:
            drawn = torch.randn(output.shape, dtype=torch.float64, generator=generator)
            differentiable.append(output)
            gradients.append(drawn.to(dtypes.get(name, output.dtype)).to(output.dtype).to(device))
    sources = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    if not sources:
        return outputs
    found = torch.autograd.grad(differentiable, list(sources.values()), gradients, materialize_grads=True)
    return outputs | {f"gradient of {name}": grad for name, grad in zip(sources, found, strict=True)}


def _named(result: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(result):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, tuple):
        return {f"output {number}": part for number, part in enumerate(result)}
    return {"output": result}


def _finding(name: str, ours: Any, expected: Any, plain: Any) -> Finding:
    if not isinstance(ours, Tensor):
        return Finding(name, type(ours).__name__, (), None, None, "" if ours == expected else f"is not {expected}")
    kind, shape = str(ours.dtype).removeprefix("torch."), tuple(ours.shape)
    if shape != tuple(expected.shape):
        return Finding(name, kind, shape, None, None, f"has not the shape {tuple(expected.shape)}")
    if ours.dtype != plain.dtype:
        return Finding(name, kind, shape, None, None, f"is not {str(plain.dtype).removeprefix('torch.')}")
    if not ours.is_floating_point():
        return Finding(name, kind, shape, None, None, "" if torch.equal(ours.cpu(), expected) else "is not equal")
    errors, ordinary = Errors.of(ours, expected), Errors.of(plain, expected)
    return Finding(name, kind, shape, errors, ordinary, _verdict(errors, ordinary, ours.dtype))


def _verdict(errors: Errors, plain: Errors, dtype: torch.dtype) -> str:
    """What is wrong with these errors; empty where nothing is. NaN fails: it is not at most anything."""
    for what, ordinary in _ordinary(plain, dtype).items():
        error, factor = getattr(errors, what), FACTOR[dtype]
        if not error <= factor * ordinary:
            return f"{what} is {error:.3g}, more than {factor:g} times plain torch's {ordinary:.3g}"
    return ""


def _ordinary(plain: Errors, dtype: torch.dtype) -> dict[str, float]:
    """What plain torch is taken for."""
    rounding = 1 if dtype.itemsize == 2 else 2
    return {what: max(getattr(plain, what), rounding * least) for what, least in ROUNDING.items()}
