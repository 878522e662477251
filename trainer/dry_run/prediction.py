"""Builds one rank and runs its step, and says what that took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import backends
from backends.operations import IGNORED
from parallel import topology as topologies
from parallel.engine import Engine
from parallel.topology import Topology
from trainer.build import build
from trainer.config.schema import Config
from trainer.config.validate import validate_layout
from trainer.data import Batch
from trainer.dry_run.memory import Memory
from trainer.dry_run.operations import Operations
from trainer.dry_run.traffic import Sent, Traffic
from trainer.model import MoETransformer
from trainer.step import Step


@dataclass(frozen=True)
class Prediction:
    """Of one rank."""

    rank: int
    topology: Topology
    parameters: int
    peak: int
    memory: dict[str, int]
    sent: dict[tuple[str, str], Sent]
    building: int


def predict(config: Config, where: str, world_size: int, rank: int, arrivals: float = 1.0) -> Prediction:
    validate_layout(config, world_size, where)
    backend = backends.select("cpu")
    with _world(world_size, rank):
        topology = topologies.start(backend, config.parallel)
        memory, traffic = Memory(), Traffic(_names(topology), arrivals)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, Operations(fake, memory, traffic):
            model, engine, pipeline = build(config, topology, backend)
            building = memory.peak
            memory.put("weights", model.parameters())
            memory.put("buffers", model.buffers())
            memory.put("gradients", (slot.view for slot in engine._slots.values()))
            memory.put("optimizer", (t for shard in engine.shards() for t in shard.state.values()))
            memory.forget_peak()
            traffic.sent.clear()
            step = Step(config, topology, backend.device, model, engine, pipeline)
            with torch.utils._python_dispatch._disable_current_modes():
                batch = _batch(config, step.sequences // topology.dp.size)
            model.train()
            step.run(batch, 1, False)
        return Prediction(
            rank=rank,
            topology=topology,
            parameters=sum(p.numel() for p in model.parameters()),
            peak=memory.peak,
            memory=memory.at_peak(),
            sent=traffic.sent,
            building=building,
        )


@contextmanager
def _world(size: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        topologies.stop()


def _names(topology: Topology) -> dict[str, str]:
    axes = {
        "world": topology.world, "dp": topology.dp, "edp": topology.edp, "ep": topology.ep_backward, "pp": topology.pp
    }
    return {axis.group.group_name: name for name, axis in axes.items()} | {topology.ep.group.group_name: "ep"}


def _batch(config: Config, sequences: int) -> Batch:
    length = config.data.sequence_length
    zeros = torch.zeros(sequences, length, dtype=torch.int64)
    return Batch(zeros, zeros, torch.arange(length).repeat(sequences, 1), zeros)
