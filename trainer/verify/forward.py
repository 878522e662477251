"""Reads what every module gets and gives in a forward pass, and how routers choose.

Shapes: B sequences of a micro-batch, S sequence, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parallel.pipeline.split import Part
from trainer.model import MicroBatch, MoETransformer
from trainer.model.layer import MultiTokenPrediction, TransformerLayer
from trainer.model.moe import Experts
from trainer.model.router import Router, Routing
from trainer.verify.readings import Readings
from trainer.verify.routing import margins

TOKENS = 2048  # of a step whose routing is kept, at most


class Forward:
    """Watches the forward passes of one model. Inside :meth:`watched` only: elsewhere nothing of it exists.

    Args:
        sequences: of the global batch.
        length: tokens of a sequence.
    """

    def __init__(self, model: MoETransformer, readings: Readings, sequences: int, length: int) -> None:
        self._model, self._readings = model, readings
        self._sequences, self._length = sequences, length
        self._stride = -(-sequences * length // TOKENS)
        self._firsts: dict[int, int] = {}  # number in the global batch of the first sequence of each micro-batch
        self._first, self._stage = 0, 0  # of what is running

    @contextmanager
    def watched(self, micro_batches: Sequence[MicroBatch], first: int) -> Iterator[None]:
        """Read what runs inside.

        Args:
            micro_batches: consecutive in the global batch, though they may run in any order.
            first: number in the global batch of their first sequence.
        """
        for batch in micro_batches:
            self._firsts[id(batch)] = first
            first += len(batch.tokens_BS)
        run = self._model.part

        def part(part: Part, hidden: Tensor | None, batch: MicroBatch) -> Tensor:
            self._first, self._stage = self._firsts[id(batch)], part.layers.start
            return run(part, hidden, batch)

        with ExitStack() as attached:
            attached.callback(self._firsts.clear)
            self._replace(attached, self._model, "part", part)
            for name, module in self._model.named_modules():
                self._attach(attached, name, module)
            yield

    def _attach(self, attached: ExitStack, name: str, module: nn.Module) -> None:
        leaf = not any(True for _ in module.children())
        if leaf or isinstance(module, (TransformerLayer, MultiTokenPrediction)):
            attached.callback(module.register_forward_pre_hook(self._entering(name)).remove)
        if name and not isinstance(module, nn.ModuleDict):
            attached.callback(module.register_forward_hook(self._leaving(name)).remove)
        if isinstance(module, Router):
            self._replace(attached, module, "_select", self._selecting(name, module))

    @staticmethod
    def _replace(attached: ExitStack, holder: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Put a function in front of a method, of this one object."""
        setattr(holder, name, function)
        attached.callback(lambda: delattr(holder, name))

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(module, Experts):
                self._read_experts(f"{name}.input", module, args[0], args[1])
                return
            given = [value for value in args if isinstance(value, Tensor) and value.is_floating_point()]
            for number, value in enumerate(given):
                self._read(f"{name}.input{number or ''}", value)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if isinstance(module, Experts):
                self._read_experts(name, module, result, args[1])
            elif isinstance(result, Routing):
                self._read(name, result.weights_TK.sort(-1, descending=True).values)  # their order means nothing
                for loss, value in result.losses.items():
                    self._read_loss(f"{name}.{loss}", value)
            else:
                self._read(name, result)

        return hook

    def _selecting(self, name: str, router: Router) -> Callable[[Tensor], Tensor]:
        select = router._select

        def wrapped(scores_BSE: Tensor) -> Tensor:
            experts_BSK = select(scores_BSE)
            if not _again():
                start = self._first * self._length
                mine = slice(-start % self._stride, None, self._stride)  # every so many tokens of the global batch
                chosen_TK = experts_BSK.flatten(0, 1)[mine].sort(-1).values
                margin_T = margins(router, scores_BSE.flatten(0, 1)[mine])
                place = -(-start // self._stride)
                self._readings.piece("experts", name, place, chosen_TK.cpu().to(torch.int16).numpy())
                self._readings.piece("margin", name, place, margin_T.cpu().float().numpy())
            return experts_BSK

        return wrapped

    def _read(self, name: str, value: Tensor) -> None:
        """A tensor (B, S, ...) or (B * S, ...): one piece of the global batch's, for sequences are consecutive."""
        if _again():
            return
        self._met(name)
        batch = value.shape[0] if value.dim() > 2 else value.shape[0] // self._length
        size = value.numel() // batch
        self._readings.add("forward", name, value, self._first * size, self._sequences * size)

    def _read_experts(self, name: str, module: Experts, rows_PH: Tensor, tokens_E: Tensor) -> None:
        """Rows by expert, those of each in an order that depends on the layout."""
        if _again():
            return
        for expert, rows in enumerate(rows_PH.split(tokens_E.tolist()), module.first):
            self._met(f"{name}[{expert}]")
            self._readings.add("forward", f"{name}[{expert}]", rows)

    def _read_loss(self, name: str, value: Tensor) -> None:
        if not _again():
            self._met(name)
            self._readings.add("loss", name, value, 0, 1)

    def _met(self, name: str) -> None:
        self._readings.order.setdefault(name, (self._stage, len(self._readings.order)))


def _again() -> bool:
    """Whether this is a recomputation: one under activation checkpointing runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1
