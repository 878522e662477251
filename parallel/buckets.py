"""ZeRO-2: a rank holds the gradients that it steps, and a few buckets of those that are on their way to other ranks.

Rajbhandari et al. 2020 (arXiv 1910.02054), section 5.2. Each micro-batch is summed over the replicas by itself, a
bucket at a time, while its backward pass still runs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from backends.weight_gradients import GradientSlot, Write
from parallel.gradients import FlatGroup

BUCKET_BYTES = 64 * 2**20  # large enough for full bandwidth, small beside the part that a rank holds


class PartGradients:
    """This rank's part of the gradients of the groups, and a workspace of a few buckets.

    A bucket is a run of whole parameters. It exists from its first gradient of a micro-batch until it has been summed
    into the parts of the ranks that own it: while the next one fills, one is on its way.

    All ranks sum the buckets in one order, that of the backward pass: by the first parameter that the forward uses,
    backwards. A bucket whose turn it is goes as soon as the backward pass is through with all of its parameters; what
    is left, parameters without a gradient included, goes at the end of the micro-batch. So ranks need not use the same
    parameters; they must where they meet inside a backward pass, as expert-parallel ranks do.

    A micro-batch has one backward pass, and its weight gradients are not put off.

    Args:
        groups: those of one replica need no buckets.
        order: a number for each parameter; it grows in the order of use.
    """

    def __init__(self, groups: Sequence[FlatGroup], order: Mapping[nn.Parameter, int]) -> None:
        self._parts = [group.zeros(group.part) for group in groups]
        self.slots: dict[nn.Parameter, GradientSlot] = {}
        self._buckets: list[Bucket] = []
        workspaces = Workspaces()
        for group, part in zip(groups, self._parts, strict=True):
            if group.replicas.size == 1:
                self.slots.update(group.slots(part))
            else:
                self._buckets += [Bucket(group, members, part, workspaces) for members in _runs(group)]
        self._buckets.sort(key=lambda bucket: -min(order[parameter] for parameter in bucket.slots))
        self._turn = 0  # of the bucket to go next
        self._going: Bucket | None = None
        self._nodes = [self._watch(bucket, parameter) for bucket in self._buckets for parameter in bucket.slots]
        for bucket in self._buckets:
            self.slots.update(bucket.slots)

    def buffers(self) -> list[Tensor]:
        """What is held of them between micro-batches."""
        return self._parts

    def _watch(self, bucket: Bucket, parameter: nn.Parameter) -> Any:
        """Learn when a backward pass is through with a parameter. The node has to be kept: the hook goes with it."""

        def through(*_: Any) -> None:  # called where the gradient is None, too: multiplies put theirs into the slot
            bucket.missing.discard(parameter)
            while self._turn < len(self._buckets) and not self._buckets[self._turn].missing:
                self._send()

        node = get_gradient_edge(parameter).node
        node.register_hook(through)
        return node

    def _send(self) -> None:
        bucket = self._buckets[self._turn]
        self._turn += 1
        self._receive()
        bucket.send()
        self._going = bucket

    def _receive(self) -> None:
        if self._going is not None:
            self._going.receive()
            self._going = None

    def end_micro_batch(self) -> None:
        """Sum what is left. After the backward pass of every micro-batch, on all ranks."""
        while self._turn < len(self._buckets):
            self._send()
        self._receive()
        for bucket in self._buckets:
            bucket.begin()
        self._turn = 0

    def reduce(self) -> list[Tensor]:
        """The part of every group (part,) that this rank steps, summed over the replicas."""
        assert not any(bucket.open for bucket in self._buckets), "end_micro_batch comes first"
        for bucket in self._buckets:
            bucket.close()
        return self._parts


class Bucket:
    """A run of a group's parameters, and a workspace with their gradients of one micro-batch while there are some.

    Args:
        members: their numbers in the group.
        part: where this rank's part of the group's gradients is added up.
        workspaces: shared by all buckets.
    """

    def __init__(self, group: FlatGroup, members: range, part: Tensor, workspaces: Workspaces) -> None:
        parameters = [group.parameters[number] for number in members]
        start = group.offsets[members[0]]
        end = group.offsets[members[-1]] + parameters[-1].numel()
        self._like, self._size, self._replicas = part, end - start, group.replicas
        self._workspaces = workspaces
        self.slots = {
            parameter: BucketSlot(self, group.offsets[number] - start, parameter.shape)
            for number, parameter in zip(members, parameters, strict=True)
        }
        self.missing = set(parameters)
        # Owner and place of every piece that lies in one rank's part.
        cuts = [start, *range((start // group.part + 1) * group.part, end, group.part), end]
        self._pieces = [(a // group.part, slice(a - start, b - start)) for a, b in pairwise(cuts)]
        self._sums: list[tuple[GradientSlot, slice]] = []
        for owner, piece in self._pieces:
            if owner == group.replicas.rank:
                first = start + piece.start - owner * group.part
                self._sums.append((GradientSlot(part[first : first + piece.stop - piece.start]), piece))
        self._workspace: Tensor | None = None
        self._works: list[Any] = []
        self._gone = False

    @property
    def open(self) -> bool:
        """Whether there is a workspace."""
        return self._workspace is not None

    def begin(self) -> None:
        """Begin a micro-batch."""
        self.missing = set(self.slots)
        self._gone = False

    def workspace(self) -> Tensor:
        """(size or more,), fp32; taken where there is none."""
        assert not self._gone, "a gradient for a bucket that has gone: one backward pass a micro-batch, none put off"
        if self._workspace is None:
            self._workspace = self._workspaces.take(self._size, self._like)
            for slot in self.slots.values():
                slot.enter(self._workspace)
        return self._workspace

    def send(self) -> None:
        """Begin to sum every piece at its owner."""
        workspace = self.workspace()
        self._gone = True
        for slot in self.slots.values():
            slot.close()
        self._works = [
            dist.reduce(workspace[piece], group_dst=owner, group=self._replicas.group, async_op=True)
            for owner, piece in self._pieces
        ]

    def receive(self) -> None:
        """Wait, add this rank's pieces to its part, and let the workspace go."""
        assert self._workspace is not None
        for work in self._works:
            work.wait()
        for total, piece in self._sums:
            total.add(self._workspace[piece])
        self._workspaces.give(self._workspace)
        self._workspace, self._works = None, []
        for slot in self.slots.values():
            slot.leave()

    def close(self) -> None:
        """End the step: the next one overwrites."""
        for total, _ in self._sums:
            total.close()


class Workspaces:
    """Memory for as many buckets as were ever open at once. Given back each time, it would leave holes in the heap."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # by size

    def take(self, size: int, like: Tensor) -> Tensor:
        """(size or more,) with the dtype and device of ``like``: the smallest that fits, or a new one for another."""
        index = bisect_left(self._free, size, key=Tensor.numel)
        if index < len(self._free):
            return self._free.pop(index)
        if self._free:
            self._free.pop()
        return torch.empty(size, dtype=like.dtype, device=like.device)

    def give(self, workspace: Tensor) -> None:
        """It is free again."""
        insort(self._free, workspace, key=Tensor.numel)


class BucketSlot(GradientSlot):
    """A place in a bucket's workspace, which exists from the first write on."""

    def __init__(self, bucket: Bucket, offset: int, shape: torch.Size) -> None:
        self._bucket, self._offset, self._shape = bucket, offset, shape
        super().__init__(torch.empty(0))

    def enter(self, workspace: Tensor) -> None:
        """There is a workspace."""
        self.view = workspace[self._offset : self._offset + self._shape.numel()].view(self._shape)

    def leave(self) -> None:
        """There is none any more."""
        self.view = torch.empty(0)

    def write(self, write: Write) -> None:
        """Add what ``write`` computes."""
        self._bucket.workspace()
        super().write(write)


def _runs(group: FlatGroup) -> Iterator[range]:
    """Numbers of the parameters of each bucket, from the end: whole parameters, up to the bucket's size."""
    limit = BUCKET_BYTES // torch.float32.itemsize
    end, elements = len(group.parameters), 0
    for number in reversed(range(len(group.parameters))):
        more = group.parameters[number].numel()
        if number + 1 < end and elements + more > limit:
            yield range(number + 1, end)
            end, elements = number + 1, 0
        elements += more
    yield range(end)
