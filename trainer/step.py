"""One optimizer step on one batch: the same in a run, in a pipeline of thousands and in a dry run.

Every loss is a sum divided by a count over the *global* batch, so ranks and micro-batches simply add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from backends.operations import IGNORED
from parallel.engine import Engine
from parallel.pipeline.pipeline import Pipeline
from parallel.topology import Topology, sum_over
from trainer.config.schema import Config
from trainer.data import Batch
from trainer.evaluation import micro_batches
from trainer.model import MicroBatch, MoETransformer, Share
from trainer.optimizer import learning_rate


class Outcome(NamedTuple):
    """What a step found, of the global batch."""

    losses: dict[str, float]
    counts: dict[str, Tensor]  # tokens per expert (E,) of every layer that has experts
    norm: float  # of the gradient, before clipping
    lr: float
    stop: bool  # whether some rank wants to stop


@dataclass
class Step:
    """Forward and backward of every micro-batch, the reduction, and the update."""

    config: Config
    topology: Topology
    device: torch.device
    model: MoETransformer
    engine: Engine
    pipeline: Pipeline

    @property
    def sequences(self) -> int:
        """Of the global batch."""
        return self.config.train.global_batch_tokens // self.config.data.sequence_length

    @property
    def mine(self) -> range:
        """Which sequences of the global batch are this rank's."""
        dp = self.topology.dp
        share = self.sequences // dp.size
        return range(dp.rank * share, (dp.rank + 1) * share)

    def run(self, batch: Batch, number: int, wants_stop: Callable[[], bool]) -> Outcome:
        """Step ``number`` (from 1), on this rank's share of the global batch.

        ``wants_stop`` is asked at the end, so that a signal during the step still counts.
        """
        self.train(self.cut(batch))
        self.reduce()
        return self.update(number, wants_stop)

    def cut(self, batch: Batch) -> list[MicroBatch]:
        """Micro-batches that know how many labels the global batch has."""
        with self.pipeline.clock.span("data"):
            tokens = sum_over(self.topology.dp, (batch.labels_BS != IGNORED).sum().to(self.device))
            share = Share(tokens=float(tokens), sequences=float(self.sequences))
            return micro_batches(batch, share, self.config, self.device)

    def train(self, micro_batches: list[MicroBatch]) -> None:
        """Gradients of all of them."""
        self.pipeline.train(micro_batches, self.engine.end_micro_batch)

    def reduce(self) -> None:
        """Sum the gradients over the replicas."""
        with self.pipeline.clock.span("reduce"):
            self.engine.reduce()

    def update(self, number: int, wants_stop: Callable[[], bool]) -> Outcome:
        """Clip, step, and move the experts' biases; what the step found."""
        config, clock = self.config, self.pipeline.clock
        lr = learning_rate(config.schedule, config.optimizer.lr, number, config.train.steps)
        with clock.span("optimizer"):
            norm = self.engine.step(lr)
        losses, counts, stop = self._gather(wants_stop)
        if math.isfinite(norm):
            for name, moe in self.model.moe_layers():
                moe.router.balance(counts[name])
        return Outcome(losses, counts, norm, lr, stop)

    def _gather(self, wants_stop: Callable[[], bool]) -> tuple[dict[str, float], dict[str, Tensor], bool]:
        """Losses and tokens per expert of the global batch, and whether any rank wants to stop: two reductions.

        A pipeline stage has some of the losses and layers: the others are zeros there, so that all ranks agree.
        """
        sums, counts = self.model.meters.take()
        names = self.config.model.loss_names()
        zero = torch.zeros((), device=self.device)
        values = torch.stack([*(sums.get(name, zero) for name in names), zero + float(wants_stop())])
        *found, wants = sum_over(self.topology.world, values).tolist()
        losses = dict(zip(names, found, strict=True))
        weights = {"mtp_loss": self.config.model.mtp_loss}
        total = {"loss": sum(weights.get(name, 1.0) * value for name, value in losses.items())}
        layers = self.config.model.moe_names()
        if layers:
            idle = torch.zeros(self.config.model.moe.num_experts, dtype=torch.int64, device=self.device)
            together = torch.stack([counts.get(name, idle) for name in layers])
            counts = dict(zip(layers, sum_over(self.topology.world, together), strict=True))
        return {**total, **losses}, counts, wants > 0
