"""Builds one rank and runs its step, and says what that took."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import backends
from backends.errors import UserError
from parallel import topology as topologies
from parallel.topology import Topology
from trainer.build import build
from trainer.config.schema import Config
from trainer.config.validate import validate_layout
from trainer.data import Batch
from trainer.dry_run.memory import Memory
from trainer.dry_run.operations import Operations
from trainer.dry_run.traffic import Sent, Traffic
from trainer.step import Step


@dataclass(frozen=True)
class Prediction:
    """What one rank holds and sends, in bytes."""

    place: dict[str, tuple[int, int]]  # this rank's number and the number of ranks on each axis: pp, edp, ep
    parameters: int  # elements of all weights here
    building: int  # most memory before the first step
    peak: int  # most memory in the step
    at_peak: dict[str, int]  # what ``peak`` is made of, by category
    micro_batches: int
    sent: dict[tuple[str, str], Sent]  # in one step, by group and kind of operation


def predict(config: Config, where: str, world_size: int, rank: int, imbalance: float = 1.0) -> Prediction:
    """Build rank ``rank`` of ``world_size`` and let it run one step, without data, weights or other processes.

    The operations and the exchanges are those of the CPU backend, wherever this runs. Experts' rows travel by
    all-to-all also where the config names another dispatcher.

    Args:
        config: the run.
        where: the config file, for messages.
        imbalance: rows that arrive for this rank's experts, as a multiple of the even share.

    Raises:
        UserError: the config cannot run on so many ranks, there is no such rank, or the imbalance is more than all rows
            of its expert-parallel group.
    """
    _check_place(world_size, rank)
    validate_layout(config, world_size, where)
    _check_imbalance(config, imbalance)
    config = replace(config, parallel=replace(config.parallel, dispatcher="all-to-all"))
    backend = backends.select("cpu")
    with fake_world(world_size, rank):
        topology = topologies.start(backend, config.parallel)
        memory, traffic = Memory(), Traffic(axis_names(topology), imbalance)
        shorter, times = _shorter(config, world_size)
        batch = _batch(shorter, world_size)
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes, Operations(fakes, memory, traffic):
            model, engine, pipeline = build(shorter, topology, backend)
            pipeline.take_turns()  # what the modes see is one thread's
            memory.put("weights", model.parameters())
            memory.put("buffers", model.buffers())
            memory.put("gradients", engine.gradients())
            memory.put("optimizer", (tensor for shard in engine.shards() for tensor in shard.state.values()))
            building = memory.peak
            memory.forget_peak()
            traffic.sent.clear()
            model.train()
            step = Step(shorter, topology, backend.device, model, engine, pipeline)
            micro_batches = step.cut(batch)
            before = dict(traffic.sent)
            step.train(micro_batches)
            traffic.repeat(before, times)
            step.reduce()
            step.update(1, wants_stop=lambda: False)
        axes = {"pp": topology.pp, "edp": topology.edp, "ep": topology.ep}
        return Prediction(
            {name: (axis.rank, axis.size) for name, axis in axes.items()},
            sum(parameter.numel() for parameter in model.parameters()),
            building,
            memory.peak,
            memory.at_peak(),
            ceil(pipeline.micro_batches * times),
            traffic.sent,
        )


def _check_place(world_size: int, rank: int) -> None:
    if world_size < 1:
        raise UserError(f"--world-size: is {world_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise UserError(f"--rank: there is no rank {rank} among {world_size}; use 0 to {world_size - 1}")


def _check_imbalance(config: Config, imbalance: float) -> None:
    ranks = config.parallel.expert
    if not 1 <= imbalance <= ranks:
        raise UserError(
            f"--imbalance: is {imbalance:g}; it must lie between 1 and parallel.expert={ranks}, where one rank gets all"
        )


@contextmanager
def fake_world(size: int, rank: int) -> Iterator[None]:
    """torch's fake process group, of which this process is one rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Set timeout is now only supported")
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # DeepSpeed checks an alignment
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            yield
        finally:
            topologies.stop()


def axis_names(topology: Topology) -> dict[str, str]:
    """The axis of each process group; the smaller one where two are the same ranks."""
    axes = [("world", topology.world), ("dp", topology.dp), ("edp", topology.edp), ("pp", topology.pp)]
    axes += [("ep", topology.ep_backward), ("ep", topology.ep)]
    return {axis.group.group_name: name for name, axis in axes}


def _shorter(config: Config, world_size: int) -> tuple[Config, Fraction]:
    """The config with as many micro-batches as tell what all would, and how many times as many there are.

    Without a pipeline two are enough: all do the same, but the first one's gradients overwrite. A pipeline needs all:
    torch keeps a buffer for what each of them receives.
    """
    layout, train = config.parallel, config.train
    if layout.pipeline > 1:
        return config, Fraction(1)
    tokens = min(train.global_batch_tokens, 2 * world_size * config.data.sequence_length * train.micro_batch_size)
    short = replace(config, train=replace(train, global_batch_tokens=tokens))
    return short, Fraction(train.global_batch_tokens, tokens)


def _batch(config: Config, world_size: int) -> Batch:
    """A rank's share of a global batch whose sequences are one document each."""
    length = config.data.sequence_length
    ranks = world_size // config.parallel.pipeline
    zeros = torch.zeros(config.train.global_batch_tokens // length // ranks, length, dtype=torch.int64)
    return Batch(zeros, zeros, torch.arange(length).expand_as(zeros), zeros)
