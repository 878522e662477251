"""An account of what this rank sends to others: calls and bytes by group and kind of operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor

_C10D = torch.ops.c10d


@dataclass(frozen=True)
class Sent:
    """By one rank in one step."""

    calls: int = 0
    bytes: int = 0


class Traffic:
    """Takes the place of the network: every call is counted, and is over at once.

    Args:
        names: what a group is called, by ``ProcessGroup.group_name``.
        imbalance: rows that arrive for this rank's experts, as a multiple of the even share.
    """

    def __init__(self, names: Mapping[str, str], imbalance: float) -> None:
        self._names, self._imbalance = names, imbalance
        self.sent: dict[tuple[str, str], Sent] = {}

    def repeat(self, before: Mapping[tuple[str, str], Sent], times: Fraction) -> None:
        """Count all that was sent since :attr:`sent` was ``before`` so often."""
        for key, sent in self.sent.items():
            old = before.get(key, Sent())
            calls, size = (sent.calls - old.calls) * times, (sent.bytes - old.bytes) * times
            self.sent[key] = Sent(old.calls + int(calls), old.bytes + int(size))

    def call(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What torch's operation ``func`` returns; counted if it sends.

        Bytes are those that leave this rank. An all-reduce of n bytes over g ranks is counted as that of a ring:
        2 n (g - 1) / g.

        Raises:
            NotImplementedError: nothing here calls such an operation.
        """
        work = FakeWork().boxed()
        if func is _C10D.recv_.default:
            return work
        if func is _C10D.send.default:
            self._count(args[1], "send", sum(tensor.nbytes for tensor in args[0]))
            return work
        if func is _C10D.allreduce_.default:
            size = dist.ProcessGroup.unbox(args[1]).size()
            self._count(args[1], "all-reduce", 2 * sum(tensor.nbytes for tensor in args[0]) * (size - 1) // size)
            return args[0], work
        if func is _C10D.reduce_.default:
            group = dist.ProcessGroup.unbox(args[1])
            self._count(args[1], "reduce", 0 if group.rank() == args[3] else sum(tensor.nbytes for tensor in args[0]))
            return work
        if func is _C10D.alltoall_base_.default:
            self._all_to_all(args[0], args[1], args[2], args[4])
            return work
        raise NotImplementedError(f"a dry run does not know the bytes of {func}")

    def _all_to_all(self, output: Tensor, rows: Tensor, boxed: Any, splits: list[int]) -> None:
        group = dist.ProcessGroup.unbox(boxed)
        rank, size = group.rank(), group.size()
        own = splits[rank] if splits else rows.shape[0] // size
        stays = rows.nbytes // rows.shape[0] * own if rows.shape[0] else 0
        self._count(boxed, "all-to-all", rows.nbytes - stays)
        if not isinstance(output, FakeTensor):  # rows of each expert: what the others send is like what stays here
            mine = rows.chunk(size)[rank]
            theirs = mine * ((self._imbalance * size - 1) / (size - 1))
            for number, part in enumerate(output.chunk(size)):
                part.copy_(mine if number == rank else theirs.round())

    def _count(self, boxed: Any, kind: str, size: int) -> None:
        group = dist.ProcessGroup.unbox(boxed)
        key = self._names[group.group_name], kind
        sent = self.sent.get(key, Sent())
        self.sent[key] = Sent(sent.calls + 1, sent.bytes + size)
