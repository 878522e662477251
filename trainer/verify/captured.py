"""The operations that a model calls, with the shapes, dtypes and constants that it gives them: captured, not listed.

A recorder stands in for the operations while the model runs once on fake tensors, so that a model of any size is
captured without its memory.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import backends
from backends.base import Backend
from backends.operations import ExpertOrder, Operations
from parallel import topology as topologies
from trainer.build import build_model
from trainer.config.schema import Config
from trainer.dry_run.memory import Memory
from trainer.dry_run.operations import Operations as Fakes
from trainer.dry_run.prediction import axis_names, fake_world
from trainer.dry_run.traffic import Traffic
from trainer.model import Share


class Spec(NamedTuple):
    """A tensor of a call without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool


class OrderSpec(NamedTuple):
    """An :class:`ExpertOrder` of a call without its values."""

    rows: int
    tokens: int
    top_k: int
    experts: int


@dataclass(frozen=True)
class Call:
    """One operation as a model calls it: by name of each parameter a :class:`Spec`, an :class:`OrderSpec`, or the
    value of what is no tensor."""

    operation: str
    arguments: tuple[tuple[str, Any], ...]

    @property
    def shapes(self) -> str:
        """ "x 4×256×192 bfloat16, weight 192 bfloat16, eps 1e-05"."""
        return ", ".join(f"{name} {_said(value)}" for name, value in self.arguments if value is not None)


def _said(value: Any) -> str:
    if isinstance(value, Spec):
        return f"{'×'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, OrderSpec):
        return f"{value.rows} rows of {value.tokens}×{value.top_k} choices, {value.experts} experts"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Recorder:
    """Passes calls on to some operations and counts them. It has every method of the interface, of whatever name."""

    def __init__(self, ops: Operations) -> None:
        self._ops = ops
        self.calls: dict[Call, int] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._ops, name)
        signature = inspect.signature(method)

        def record(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            call = Call(name, tuple((key, _spec(value)) for key, value in given.arguments.items()))
            self.calls[call] = self.calls.get(call, 0) + 1
            return method(*args, **kwargs)

        return record


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Spec(tuple(value.shape), value.dtype, value.requires_grad)
    if isinstance(value, ExpertOrder):
        tokens, top_k = value.inverse_TK.shape
        return OrderSpec(len(value.order_P), tokens, top_k, len(value.counts_E))
    return value


def capture(config: Config, tokens: Optional[int] = None) -> dict[Call, int]:
    """Every distinct call of one micro-batch's forward pass, and how often it comes; in their order.

    The model is that of one rank of ``parallel.expert``, with all its layers.

    Args:
        tokens: the most of a micro-batch; longer ones are cut to fewer sequences, then to shorter ones.
    """
    length, sequences = config.data.sequence_length, config.train.micro_batch_size
    if tokens is not None:
        length = min(length, tokens)
        sequences = max(1, min(sequences, tokens // length))
    ranks = config.parallel.expert
    config = replace(
        config,
        parallel=replace(config.parallel, pipeline=1, stages_per_rank=0, layers_per_stage=[], dispatcher="all-to-all"),
        data=replace(config.data, sequence_length=length),
        train=replace(
            config.train,
            micro_batch_size=sequences,
            global_batch_tokens=ranks * sequences * length,
            activation_checkpointing="none",  # it would call everything once more, with the same arguments
        ),
    )
    recorder = Recorder(backends.select("cpu").ops)
    with warnings.catch_warnings(), fake_world(ranks, 0):
        topology = topologies.start(backends.select("cpu"), config.parallel)
        traffic = Traffic(axis_names(topology), imbalance=1.0)
        zeros = torch.zeros(sequences, length, dtype=torch.int64)
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes, Fakes(fakes, Memory(), traffic):
            model, _ = build_model(config, topology, _recording(recorder))
            model(zeros, documents_BS=zeros, labels_BS=zeros, share=Share(1.0, 1.0))
    return recorder.calls


def _recording(recorder: Recorder) -> Backend:
    """The CPU with the recorder for its operations."""
    backend = backends.select("cpu")
    backend.ops = recorder  # type: ignore[assignment]
    return backend
