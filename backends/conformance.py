"""The table of cases that every backend's operations are checked with: each operation at each kind of input.

``backends.accuracy.measure(case.run, case.inputs(), dtype, ops, device)`` gives the findings of one case. fp64 inputs
are the ones that are rounded to the dtype in question. A case keeps hidden sizes small: what breaks an operation is
its structure (experts without tokens, odd sizes, strides), and the same table has to run on a slow CPU.

Shape suffixes as in ``backends/operations.py``.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from backends.accuracy import Run
from backends.operations import IGNORED, Operations

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One operation at one kind of input.

    Attributes:
        operation: the method of :class:`Operations` that it is about.
        title: what is particular about the inputs.
        run: the call, as ``backends.accuracy.measure`` takes it.
        make: the inputs from a random generator.
        slow: whether it takes more than a second on a CPU.
    """

    operation: str
    title: str
    run: Run
    make: Callable[["Draw"], Inputs]
    slow: bool = False

    @property
    def name(self) -> str:
        """The operation and what is particular."""
        return f"{self.operation}: {self.title}"

    def inputs(self, seed: int = 0) -> Inputs:
        """Inputs on the CPU, the same at each call."""
        return self.make(Draw(seed))


class Draw:
    """Random inputs. fp64 ones require a gradient."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64, generator=self._generator)
        return x.mul_(scale).requires_grad_()

    def weights(self, *shape: int) -> Tensor:
        """Routing weights: positive, in fp32 whatever the dtype of the case."""
        return torch.rand(shape, generator=self._generator).requires_grad_()

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator)

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self._generator)

    def choices(self, tokens: int, top_k: int, experts: int) -> Tensor:
        """``top_k`` different experts for each token."""
        return torch.rand(tokens, experts, generator=self._generator).argsort(1)[:, :top_k]

    def angles(self, batch: int, length: int, half: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines in fp32, which get no gradient."""
        angle = torch.rand(batch, length, half, generator=self._generator) * 2 * math.pi
        return angle.cos(), angle.sin()


def cases(operation: Optional[str] = None) -> Iterator[Case]:
    """The cases of one operation, or of all."""
    return (case for case in CASES if operation in (None, case.operation))


# linear


def _linear(rows: tuple[int, ...], inner: int, outer: int, bias: bool = True) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        given = {"x": draw.normal(*rows, inner), "weight": draw.normal(outer, inner, scale=inner**-0.5)}
        return given | ({"bias": draw.normal(outer)} if bias else {})

    return make


def _run_linear(ops: Operations, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    return ops.linear(x, weight, bias)


def _run_linear_transposed(ops: Operations, x: Tensor, weight: Tensor) -> Tensor:
    return ops.linear(x.transpose(0, 1), weight).sum(0)  # a view in, and a gradient of stride 0 back


LINEAR = [
    Case("linear", "usual", _run_linear, _linear((2, 16), 64, 48)),
    Case("linear", "without bias, prime sizes", _run_linear, _linear((3, 7), 37, 29, bias=False)),
    Case("linear", "one token", _run_linear, _linear((1, 1), 64, 40)),
    Case("linear", "no token", _run_linear, _linear((0,), 16, 24)),
    Case("linear", "transposed input, expanded gradient", _run_linear_transposed, _linear((5, 3), 24, 16, bias=False)),
    Case("linear", "100,000 tokens", _run_linear, _linear((100_000,), 16, 24), slow=True),
]


# What needs an order of rows gets the choices and sorts them itself, on its own device: everything else follows.


@dataclass(frozen=True)
class _Routing:
    title: str
    experts: int
    top_k: int
    choices: Callable[[Draw], Tensor]
    slow: bool = False


def _given(experts_TK: list[list[int]]) -> Callable[[Draw], Tensor]:
    return lambda draw: torch.tensor(experts_TK, dtype=torch.int64)


def _some_dropped(draw: Draw) -> Tensor:
    choices = draw.choices(41, 3, 7)
    return choices.masked_fill(draw.integers(4, 41, 3) == 0, 7)


ROUTINGS = [
    _Routing("usual", 7, 3, lambda draw: draw.choices(41, 3, 7)),
    _Routing("empty experts", 9, 2, lambda draw: draw.choices(17, 2, 3) * 3 + 1),
    _Routing("all tokens to one expert", 5, 1, lambda draw: torch.full((23, 1), 3)),
    _Routing("one expert in total", 1, 1, lambda draw: torch.zeros(11, 1, dtype=torch.int64)),
    _Routing("one token", 6, 4, _given([[5, 0, 3, 1]])),
    _Routing("no token", 4, 2, lambda draw: torch.empty(0, 2, dtype=torch.int64)),
    _Routing("some choices dropped", 7, 3, _some_dropped),
    _Routing("all choices dropped", 3, 2, lambda draw: torch.full((5, 2), 3)),
    _Routing("100,000 tokens, 192 experts", 192, 2, lambda draw: draw.choices(100_000, 2, 192), slow=True),
]


def _routed(
    operation: str,
    call: Callable[..., Any],
    inputs: Callable[[Draw, _Routing, int, int], Inputs],
) -> list[Case]:
    """A case for each routing. ``call(ops, order, *inputs)``; ``inputs(draw, routing, tokens, rows)``."""

    def case(routing: _Routing) -> Case:
        def make(draw: Draw) -> Inputs:
            choices = routing.choices(draw)
            rows = int((choices < routing.experts).sum())
            return {"experts": choices} | inputs(draw, routing, choices.shape[0], rows)

        def run(ops: Operations, experts_TK: Tensor, *given: Tensor) -> Any:
            return call(ops, ops.sort_by_expert(experts_TK, routing.experts), *given)

        return Case(operation, routing.title, run, make, routing.slow)

    return [case(routing) for routing in ROUTINGS]


SORT = _routed("sort_by_expert", lambda ops, order: order, lambda draw, routing, tokens, rows: {})
SORT.append(
    Case(
        "sort_by_expert",
        "promised that none is dropped",
        lambda ops, experts: ops.sort_by_expert(experts, 7, dropping=False),
        lambda draw: {"experts": draw.choices(41, 3, 7)},
    )
)

PERMUTE = _routed(
    "permute",
    lambda ops, order, x: ops.permute(x, order),
    lambda draw, routing, tokens, rows: {"x": draw.normal(tokens, 13)},
)

UNPERMUTE = _routed(
    "unpermute",
    lambda ops, order, y, weights: ops.unpermute(y, order, weights),
    lambda draw, routing, tokens, rows: {"y": draw.normal(rows, 13), "weights": draw.weights(tokens, routing.top_k)},
)
UNPERMUTE += [
    Case(
        "unpermute",
        "weights of the dtype of the rows, expanded gradient",
        lambda ops, experts, y, weights: ops.unpermute(y, ops.sort_by_expert(experts, 5), weights).sum(0),
        lambda draw: {"experts": draw.choices(19, 2, 5), "y": draw.normal(38, 8), "weights": draw.normal(19, 2)},
    )
]

ADD_EXPERT_BIAS = _routed(
    "add_expert_bias",
    lambda ops, order, y, bias: ops.add_expert_bias(y, bias, order.counts_E),
    lambda draw, routing, tokens, rows: {"y": draw.normal(rows, 11), "bias": draw.normal(routing.experts, 11)},
)


def _experts(inner: int, outer: int) -> Callable[[Draw, _Routing, int, int], Inputs]:
    def inputs(draw: Draw, routing: _Routing, tokens: int, rows: int) -> Inputs:
        weight = draw.normal(routing.experts, outer, inner, scale=inner**-0.5)
        return {"x": draw.normal(rows, inner), "weight": weight}

    return inputs


def _grouped(ops: Operations, order: Any, x: Tensor, weight: Tensor) -> Tensor:
    return ops.grouped_mm(x, weight, order.counts_E)


def _grouped_expanded(ops: Operations, x: Tensor, weight: Tensor) -> Tensor:
    counts = torch.tensor([3, 0, 6], device=x.device)
    return ops.grouped_mm(x.transpose(0, 1), weight, counts).sum(0)


GROUPED_MM = _routed("grouped_mm", _grouped, _experts(32, 24))
GROUPED_MM += [
    Case(
        "grouped_mm",
        "prime sizes",
        lambda ops, experts, x, weight: _grouped(ops, ops.sort_by_expert(experts, 5), x, weight),
        lambda draw: {
            "experts": draw.choices(31, 2, 5),
            "x": draw.normal(62, 37),
            "weight": draw.normal(5, 29, 37, scale=37**-0.5),
        },
    ),
    Case(
        "grouped_mm",
        "transposed input, expanded gradient",
        _grouped_expanded,
        lambda draw: {"x": draw.normal(16, 9), "weight": draw.normal(3, 8, 16, scale=0.25)},
    ),
]


def _rows(size: int) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        index = draw.permutation(size)
        return {"x": draw.normal(size, 7), "index": index, "inverse": index.argsort()}

    return make


TAKE_ROWS = [
    Case("take_rows", title, lambda ops, x, index, inverse: ops.take_rows(x, index, inverse), _rows(size), size > 1000)
    for title, size in (("usual", 53), ("one token", 1), ("no token", 0), ("100,000 tokens", 100_000))
]


# Norms, SwiGLU and rotary embedding


def _norm(*shape: int, scale: float = 1.0) -> Callable[[Draw], Inputs]:
    return lambda draw: {"x": draw.normal(*shape, scale=scale), "weight": draw.normal(shape[-1])}


def _run_norm(ops: Operations, x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x, weight, 1e-6)


def _run_norm_of_heads(ops: Operations, x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x[..., 3:10], weight[3:10], 1e-6).sum(1)


RMS_NORM = [
    Case("rms_norm", "usual", _run_norm, _norm(2, 16, 64)),
    Case("rms_norm", "prime sizes", _run_norm, _norm(3, 5, 37)),
    Case("rms_norm", "one token", _run_norm, _norm(1, 96)),
    Case("rms_norm", "no token", _run_norm, _norm(0, 8)),
    Case("rms_norm", "small entries, where eps counts", _run_norm, _norm(9, 32, scale=1e-3)),
    Case("rms_norm", "a slice, expanded gradient", _run_norm_of_heads, _norm(4, 6, 12)),
    Case(
        "rms_norm",
        "residual stream in fp32, weight in the dtype",
        _run_norm,
        lambda draw: {"x": draw.normal(7, 48).detach().float().requires_grad_(), "weight": draw.normal(48)},
    ),
    Case("rms_norm", "100,000 tokens", _run_norm, _norm(100_000, 16), slow=True),
]


def _gates(*shape: int) -> Callable[[Draw], Inputs]:
    return lambda draw: {"gate_up": draw.normal(*shape, scale=2.0)}


SWIGLU = [
    Case("swiglu", title + clamped, run, _gates(*shape), shape[0] > 1000)
    for clamped, limit in (("", None), (", clamped", 2.0))
    for title, run, shape in (
        ("usual", lambda ops, x, limit=limit: ops.swiglu(x, limit), (3, 16, 32)),
        ("prime sizes", lambda ops, x, limit=limit: ops.swiglu(x, limit), (13, 38)),
        ("one token", lambda ops, x, limit=limit: ops.swiglu(x, limit), (1, 64)),
        ("no token", lambda ops, x, limit=limit: ops.swiglu(x, limit), (0, 8)),
        ("a slice, expanded gradient", lambda ops, x, limit=limit: ops.swiglu(x[:, 2:18], limit).sum(0), (9, 24)),
        ("100,000 tokens", lambda ops, x, limit=limit: ops.swiglu(x, limit), (100_000, 16)),
    )
]


def _heads(shape: tuple[int, ...], half: int, batch: Optional[int] = None) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        cos, sin = draw.angles(shape[0] if batch is None else batch, shape[1], half)
        return {"x": draw.normal(*shape), "cos": cos, "sin": sin}

    return make


ROTARY = [
    Case("rotary", title + (", interleaved" if interleaved else ""), run, inputs, slow)
    for interleaved in (False, True)
    for title, run, inputs, slow in (
        (
            "usual",
            lambda ops, x, cos, sin, i=interleaved: ops.rotary(x, cos, sin, i),
            _heads((2, 9, 4, 16), 8, batch=1),
            False,
        ),
        (
            "part of a head, a table for each sequence, prime sizes",
            lambda ops, x, cos, sin, i=interleaved: ops.rotary(x, cos, sin, i),
            _heads((3, 7, 5, 19), 3),
            False,
        ),
        (
            "one token",
            lambda ops, x, cos, sin, i=interleaved: ops.rotary(x, cos, sin, i),
            _heads((1, 1, 1, 4), 2),
            False,
        ),
        (
            "a slice of a projection (MLA), expanded gradient",
            lambda ops, x, cos, sin, i=interleaved: ops.rotary(x[..., 8:], cos, sin, i).sum(2),
            _heads((2, 5, 3, 14), 3),
            False,
        ),
        (
            "100,000 tokens",
            lambda ops, x, cos, sin, i=interleaved: ops.rotary(x, cos, sin, i),
            _heads((2, 50_000, 1, 8), 4, batch=1),
            True,
        ),
    )
]


# Attention


def _attention(
    title: str,
    queries: int,
    keys: int,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (16, 16),
    documents: Optional[Callable[[Draw, int], Tensor]] = None,
    window: int = 0,
    sinks: bool = False,
    batch: int = 2,
    expanded: bool = False,
    slow: bool = False,
) -> Case:
    """``sizes`` are those of a query/key head and of a value head; ``documents`` gives (batch, keys)."""
    (N, M), (D, W) = heads, sizes

    def make(draw: Draw) -> Inputs:
        given: Inputs = {
            "q": draw.normal(batch, queries, N, D),
            "k": draw.normal(batch, keys, M, D),
            "v": draw.normal(batch, keys, M, W),
            "documents": documents(draw, keys) if documents else None,
        }
        return given | ({"sinks": draw.normal(N)} if sinks else {})

    def run(
        ops: Operations, q: Tensor, k: Tensor, v: Tensor, documents: Optional[Tensor], sinks: Optional[Tensor] = None
    ) -> Tensor:
        y = ops.attention(q, k, v, D**-0.5, documents, window, sinks)
        return y.sum(1) if expanded else y

    return Case("attention", title, run, make, slow)


def _packed(draw: Draw, length: int) -> Tensor:
    """Documents one after the other, with other ends in each of the two sequences."""
    ends = torch.zeros(2, length, dtype=torch.int64)
    ends[0, length // 3], ends[0, length // 2], ends[1, length - 2] = 1, 1, 1
    return ends.cumsum(1)


def _alone(draw: Draw, length: int) -> Tensor:
    return torch.arange(length).expand(2, -1).contiguous()


def _any_order(draw: Draw, length: int) -> Tensor:
    return draw.integers(4, 2, length)


ATTENTION = [
    _attention("grouped queries", 37, 37),
    _attention("as many keys as queries have heads", 17, 17, heads=(3, 3)),
    _attention("one key head", 19, 19, heads=(6, 1)),
    _attention("prime sizes", 13, 13, heads=(5, 5), sizes=(7, 11)),
    _attention("MLA: 192 and 128", 11, 11, heads=(2, 2), sizes=(192, 128)),
    _attention("MLA, compressed: 40 and 32, one key head", 3, 11, heads=(4, 1), sizes=(40, 32)),
    _attention("one token", 1, 1, batch=1),
    _attention("one query", 1, 29),
    _attention("fewer queries than keys", 7, 29),
    _attention("more than one block", 150, 150, heads=(2, 1), sizes=(8, 8), batch=1),
    _attention("packed documents", 41, 41, documents=_packed),
    _attention("packed documents, more than one block", 131, 131, heads=(2, 1), sizes=(8, 8), documents=_packed),
    _attention("a document at each position", 13, 13, documents=_alone),
    _attention("documents in any order", 31, 31, documents=_any_order),
    _attention("documents, fewer queries than keys", 9, 31, documents=_packed),
    _attention("window", 31, 31, window=5),
    _attention("window of one", 11, 11, window=1),
    _attention("window longer than the sequence", 11, 11, window=64),
    _attention("window, fewer queries than keys", 6, 31, window=7),
    _attention("window, more than one block", 150, 150, heads=(2, 1), sizes=(8, 8), window=20, batch=1),
    _attention("window and documents", 31, 31, window=6, documents=_packed),
    _attention("sinks", 31, 31, heads=(4, 2), sinks=True),
    _attention("sinks and window (gpt-oss)", 37, 37, heads=(8, 1), sizes=(16, 16), window=8, sinks=True),
    _attention("sinks, window and documents", 31, 31, window=6, documents=_packed, sinks=True),
    _attention("sinks, one query", 1, 29, sinks=True),
    _attention("expanded gradient", 23, 23, expanded=True),
    _attention("sinks, expanded gradient", 23, 23, sinks=True, expanded=True),
    _attention("1,500 positions", 1500, 1500, heads=(2, 1), sizes=(16, 16), batch=1, slow=True),
    _attention("1,500 positions, window and sinks", 1500, 1500, (2, 1), (16, 16), None, 128, True, 1, slow=True),
]


# The head


def _head(tokens: int, hidden: int, vocabulary: int, ignored: int = 0) -> Callable[[Draw], Inputs]:
    """``ignored`` out of 4 labels predict nothing."""

    def make(draw: Draw) -> Inputs:
        labels = draw.integers(vocabulary, tokens)
        labels = labels.masked_fill(torch.arange(tokens) % 4 < ignored, IGNORED)
        return {"hidden": draw.normal(tokens, hidden), "weight": draw.normal(vocabulary, hidden), "labels": labels}

    return make


def _run_head(ops: Operations, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return ops.linear_cross_entropy(hidden, weight, labels)


HEAD = [
    Case("linear_cross_entropy", title, _run_head, make, slow)
    for title, make, slow in (
        ("usual", _head(48, 32, 101), False),
        ("some labels ignored, prime sizes", _head(43, 29, 67, ignored=1), False),
        ("all labels ignored", _head(8, 16, 23, ignored=4), False),
        ("one token", _head(1, 16, 33), False),
        ("no token", _head(0, 16, 12), False),
        ("100,000 tokens", _head(100_000, 8, 192, ignored=1), True),
    )
]

CASES: tuple[Case, ...] = tuple(
    LINEAR
    + GROUPED_MM
    + SORT
    + PERMUTE
    + UNPERMUTE
    + TAKE_ROWS
    + RMS_NORM
    + ADD_EXPERT_BIAS
    + SWIGLU
    + ROTARY
    + ATTENTION
    + HEAD
)
