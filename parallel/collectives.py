"""Collectives over a flat tensor whose equal parts belong to the ranks of a group, in their order.

On the CPU the ranks exchange parts directly, each from where it is to where it belongs. gloo's reduce-scatter is an
all-reduce of a copy, which has twice the traffic, and its all-gather fills a copy of the whole: a step's worth of new
memory each, which took up to four times as long (docs/benchmarks.md, "The engine on several processes").
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_part(flat: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of ``flat``, which becomes the sum over the ranks. The other parts are of no use any more."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = flat.chunk(size)
    own = parts[rank]
    if size == 1:
        return own
    if flat.device.type != "cpu":
        dist.reduce_scatter_single(own, flat, group=group)
        return own
    theirs = torch.empty_like(own)
    for distance in range(1, size):
        to, origin = (rank + distance) % size, (rank - distance) % size
        _exchange([_send(parts[to], to, group), _receive(theirs, origin, group)])
        own += theirs
    return own


def gather_parts(flat: Tensor, group: dist.ProcessGroup) -> None:
    """Fill ``flat``, of which this rank has its own part, with those of the others."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = flat.chunk(size)
    if size == 1:
        return
    if flat.device.type != "cpu":
        dist.all_gather_single(flat, parts[rank], group=group)
        return
    others = [other for other in range(size) if other != rank]
    _exchange([_send(parts[rank], other, group) for other in others] + [_receive(parts[o], o, group) for o in others])


def _send(part: Tensor, to: int, group: dist.ProcessGroup) -> dist.P2POp:
    return dist.P2POp(dist.isend, part, group=group, group_peer=to)


def _receive(part: Tensor, origin: int, group: dist.ProcessGroup) -> dist.P2POp:
    return dist.P2POp(dist.irecv, part, group=group, group_peer=origin)


def _exchange(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()
