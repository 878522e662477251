"""One picture of the ranks: a `DeviceMesh` with the axes pp, edp and ep; dp is edp and ep flattened.

A rank's number is ``(pp * edp_size + edp) * ep_size + ep``: expert-parallel ranks are neighbours, so that their
all-to-all stays inside a node where it can.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from backends.base import Backend
from parallel.config import ParallelConfig
from parallel.network import choose_interface

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """One mesh axis seen from this rank."""

    group: dist.ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True)
class Topology:
    """The mesh and this rank's place on each axis."""

    mesh: DeviceMesh
    rank: int
    world_size: int
    pp: Axis
    edp: Axis  # replicas of the same experts
    ep: Axis  # ranks that share out the experts of one layer
    ep_backward: Axis  # the same ranks, to talk to in a backward pass; a group of its own where passes overlap
    dp: Axis  # replicas of everything else: edp × ep
    world: Axis

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0


def world_size_from_environment() -> int:
    """Processes of this job, as the launcher tells: known before any of them has met another."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def attempt_from_environment() -> int:
    """How often torchrun has started these ranks again. It keeps one store for all attempts, so keys carry this:
    otherwise ranks find addresses and words of processes long gone."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def start(backend: Backend, config: ParallelConfig) -> Topology:
    """Join the other processes (or none) and lay the mesh over them.

    Under a launcher (deepspeed, torchrun) the usual environment variables say where to meet; without one this
    process is a world of its own and no port is opened. Processes that have met already stay with their group.
    The world size must factor into the configured axes.
    """
    limit = timedelta(minutes=config.timeout_minutes)
    world = dist.get_world_size() if dist.is_initialized() else world_size_from_environment()
    assert world % (config.pipeline * config.expert) == 0, "validate_layout of the config comes first"
    if not dist.is_initialized():
        # Checkpoints and metadata travel on the CPU even where tensors travel by NCCL or HCCL.
        name = (
            "gloo" if backend.device.type == "cpu" else f"cpu:gloo,{backend.device.type}:{backend.distributed_backend}"
        )
        if "RANK" in os.environ:
            choose_interface(world)
            store, rank, _ = next(dist.rendezvous("env://", timeout=limit))
            store = dist.PrefixStore(f"start-{attempt_from_environment()}", store)
            dist.init_process_group(name, store=store, rank=rank, world_size=world, timeout=limit)
        else:
            dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    shape = (config.pipeline, world // (config.pipeline * config.expert), config.expert)
    if (shape, config.overlaps) not in _laid:
        _laid[shape, config.overlaps] = _lay(backend, shape, config.overlaps, limit)
    return _laid[shape, config.overlaps]


# A gloo group has threads of its own that live as long as the process: a second run on the same layout shares them.
_laid: dict[tuple[tuple[int, int, int], bool], Topology] = {}


def _lay(backend: Backend, shape: tuple[int, int, int], overlaps: bool, limit: timedelta) -> Topology:
    """The mesh of that shape over all ranks."""
    world = dist.get_world_size()
    names = ("pp", "edp", "ep")
    options: dict[int | str, Any] = {}
    for name, size in zip(names, shape, strict=True):
        special = backend.group_options(name)
        if size > 1 and special is not None:
            options[name] = special
    mesh = init_device_mesh(backend.device.type, shape, mesh_dim_names=names, backend_override=options or None)
    flat = mesh["edp", "ep"]._flatten("dp", backend.group_options("dp")) if world > 1 else None
    for part in (mesh, flat) if flat else (mesh,):
        for group in part.get_all_groups():
            _set_pg_timeout(limit, group)  # a mesh gives its groups torch's own limit

    def axis(name: str) -> Axis:
        part = flat if name == "dp" and flat is not None else mesh["ep" if name == "dp" else name]
        return Axis(part.get_group(), part.get_local_rank(), part.size())

    assert dist.group.WORLD is not None
    everyone = Axis(dist.group.WORLD, dist.get_rank(), world)
    ep, dp = axis("ep"), axis("dp")
    backward = ep
    if overlaps and ep.size > 1:
        # Two threads cannot keep to one order of calls on one group.
        ranks = mesh.mesh.view(-1, ep.size).tolist()
        own, _ = dist.new_subgroups_by_enumeration(ranks, pg_options=backend.group_options("ep"))
        assert own is not None
        backward = Axis(own, ep.rank, ep.size)
    return Topology(mesh, dist.get_rank(), world, axis("pp"), axis("edp"), ep, backward, dp, everyone)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _laid.clear()


@contextmanager
def joined(backend: Backend, config: ParallelConfig) -> Iterator[Topology]:
    """:func:`start`, and in the end :func:`stop`, unless this process was in a group before."""
    before = dist.is_initialized()
    try:
        yield start(backend, config)
    finally:
        if not before:
            stop()


def said_by_main(value: T) -> T:
    """The main rank's ``value``, on every rank; pickled, so for small things."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over(axis: Axis, value: torch.Tensor) -> torch.Tensor:
    """Sum of ``value`` over the axis, in place."""
    if axis.size > 1:
        dist.all_reduce(value, group=axis.group)
    return value
