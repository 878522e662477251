"""The gradients of a step in flat fp32 buffers, until the optimizer reads the part that this rank steps: ZeRO-1.

That is: every rank holds all of them, and they are summed over the replicas once a step (Rajbhandari et al. 2020,
arXiv 1910.02054, section 5.1). parallel/buckets.py is ZeRO-2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backends.weight_gradients import GradientSlot
from parallel.collectives import sum_part
from parallel.topology import Axis


@dataclass(frozen=True)
class FlatGroup:
    """Parameters one after the other in a flat order. Rank r of the replicas steps the r-th equal part of it."""

    parameters: Sequence[nn.Parameter]
    offsets: Sequence[int]  # of each parameter's first element
    size: int  # elements, the padding at the end included
    replicas: Axis

    @property
    def part(self) -> int:
        """Elements that each rank steps."""
        return self.size // self.replicas.size

    def zeros(self, size: int) -> Tensor:
        """(size,), fp32, where the parameters are."""
        return torch.zeros(size, dtype=torch.float32, device=self.parameters[0].device)

    def slots(self, flat: Tensor) -> Iterator[tuple[nn.Parameter, GradientSlot]]:
        """Every parameter with its place in ``flat`` (size,)."""
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            yield parameter, GradientSlot(flat[offset : offset + parameter.numel()].view_as(parameter))


class WholeGradients:
    """All gradients of the groups. Nothing is allocated in a step, and most gradients are written once.

    ``slots`` has the place of every parameter's gradient.
    """

    def __init__(self, groups: Sequence[FlatGroup]) -> None:
        self._flats = [(group, group.zeros(group.size)) for group in groups]
        self.slots = {parameter: slot for group, flat in self._flats for parameter, slot in group.slots(flat)}

    def buffers(self) -> list[Tensor]:
        """All that is held of them."""
        return [flat for _, flat in self._flats]

    def end_micro_batch(self) -> None:
        """Nothing to do: micro-batches add up where they are."""

    def reduce(self) -> list[Tensor]:
        """The part of every group (part,) that this rank steps, summed over the replicas. The slots must be closed."""
        return [sum_part(flat, group.replicas.group) for group, flat in self._flats]
