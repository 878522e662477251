"""Inputs for a captured call: valid where the operation asks for something, otherwise of one of several distributions.

Shape suffixes as in ``backends/operations.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from backends.functions.rows import sort_by_expert
from backends.operations import IGNORED
from trainer.verify.captured import Call, OrderSpec, Spec


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _heavy(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Student's t with 2 degrees of freedom, whose variance is infinite: outliers, as hidden states have."""
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator).clamp(1e-6, 1 - 1e-6)
    return (2 * uniform - 1) / (2 * uniform * (1 - uniform)).sqrt()


DISTRIBUTIONS: Mapping[str, Callable[[tuple[int, ...], Generator], Tensor]] = {
    "normal": _normal,
    "heavy-tailed": _heavy,
    "near zero": lambda shape, generator: _normal(shape, generator) * 2**-10,  # squares beside a norm's eps
    "large": lambda shape, generator: _normal(shape, generator) * 2**4,
}


def inputs(call: Call, distribution: str, compute: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Tensors of a call by name of its parameter, as ``backends.accuracy.measure`` takes them.

    Floating tensors of the dtype ``compute`` are in fp64, to be rounded; others have the captured dtype. Those that
    a gradient was wanted of require one. An order of rows is three tensors, ``<name>.order_P`` and so on.

    Args:
        distribution: of activations. Weights are normal, and scaled so that what they multiply keeps its size.
    """
    generator = torch.Generator().manual_seed(seed)
    arguments = dict(call.arguments)
    made: dict[str, Any] = {}
    for name, spec in arguments.items():
        if isinstance(spec, OrderSpec):
            order = sort_by_expert(_choices(spec, generator), spec.experts, dropping=True)
            made |= {f"{name}.{part}": getattr(order, part) for part in ("order_P", "inverse_TK", "counts_E")}
        elif isinstance(spec, Spec):
            made[name] = _tensor(name, spec, arguments, distribution, compute, generator, made)
    return made


def _tensor(
    name: str,
    spec: Spec,
    arguments: Mapping[str, Any],
    distribution: str,
    compute: torch.dtype,
    generator: Generator,
    made: Mapping[str, Any],
) -> Tensor:
    if not spec.dtype.is_floating_point:
        return _INTEGERS[name](spec, arguments, generator, made)
    if name in _FLOATS:
        value = _FLOATS[name](spec, generator, made)
    elif name.startswith("weight"):
        value = _normal(spec.shape, generator) * spec.shape[-1] ** -0.5
        if len(spec.shape) == 1:  # a norm's
            value = 1 + 0.1 * _normal(spec.shape, generator)
    else:
        value = DISTRIBUTIONS[distribution](spec.shape, generator)
    rounded = value if spec.dtype == compute else value.to(spec.dtype)
    return rounded.requires_grad_(spec.differentiable)


def _choices(spec: OrderSpec, generator: Generator) -> Tensor:
    """(T, K) different experts for each token, of which as many are dropped as rows are missing.

    Some experts are chosen often and one never, as a router does and an even share would not show.
    """
    liked = torch.randn(spec.experts, generator=generator)
    if spec.experts > spec.top_k:
        liked[spec.experts // 2] = -math.inf
    scores_TE = liked + torch.randn(spec.tokens, spec.experts, generator=generator)
    choices = scores_TE.argsort(1, descending=True)[:, : spec.top_k].contiguous()
    dropped = torch.randperm(choices.numel(), generator=generator)[: choices.numel() - spec.rows]
    choices.view(-1)[dropped] = spec.experts
    return choices


def _experts(spec: Spec, arguments: Mapping[str, Any], generator: Generator, made: Mapping[str, Any]) -> Tensor:
    tokens, top_k = spec.shape
    rows = tokens * top_k - (tokens * top_k // 8 if arguments["dropping"] else 0)
    return _choices(OrderSpec(rows, tokens, top_k, arguments["num_experts"]), generator)


def _counts(spec: Spec, arguments: Mapping[str, Any], generator: Generator, made: Mapping[str, Any]) -> Tensor:
    """Uneven ones that sum to the rows of the call; an expert has none."""
    rows, (experts,) = next(iter(arguments.values())).shape[0], spec.shape
    return torch.bincount(_choices(OrderSpec(rows, rows, 1, experts), generator).flatten(), minlength=experts)


def _documents(spec: Spec, arguments: Mapping[str, Any], generator: Generator, made: Mapping[str, Any]) -> Tensor:
    """About four documents a row."""
    begins = torch.rand(spec.shape, generator=generator) < 4 / spec.shape[-1]
    return begins.cumsum(-1)


def _labels(spec: Spec, arguments: Mapping[str, Any], generator: Generator, made: Mapping[str, Any]) -> Tensor:
    labels = torch.randint(arguments["weight_VH"].shape[0], spec.shape, generator=generator)
    return labels.masked_fill(torch.rand(spec.shape, generator=generator) < 0.1, IGNORED)


_INTEGERS: Mapping[str, Callable[..., Tensor]] = {
    "experts_TK": _experts,
    "counts_E": _counts,
    "documents_BL": _documents,
    "labels_T": _labels,
    "index_P": lambda spec, _, generator, made: torch.randperm(spec.shape[0], generator=generator),
    "inverse_P": lambda spec, _, generator, made: made["index_P"].argsort(),
}


def _cosines(spec: Spec, generator: Generator, made: Mapping[str, Any]) -> Tensor:
    return (torch.rand(spec.shape, dtype=torch.float64, generator=generator) * 2 * math.pi).cos()


def _sines(spec: Spec, generator: Generator, made: Mapping[str, Any]) -> Tensor:
    """Of the angles whose cosines are there, between 0 and π."""
    return (1 - made["cos_BSR"].double().square()).sqrt()


_FLOATS: Mapping[str, Callable[..., Tensor]] = {
    "cos_BSR": _cosines,
    "sin_BSR": _sines,
    "weights_TK": lambda spec, generator, made: torch.rand(spec.shape, dtype=torch.float64, generator=generator),
    "sinks_N": lambda spec, generator, made: _normal(spec.shape, generator),
    # With large queries and keys a softmax has one 1 and else 0, and gradients have no size that an error could be a
    # share of.
    "k_BLMD": lambda spec, generator, made: _normal(spec.shape, generator),
}
