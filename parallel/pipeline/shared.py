"""A weight that the first and the last stage of a pipeline both use: the embedding, tied to the head or read by MTP.

The first stage owns it: only there it has a master weight and moments. The last stage keeps a copy, hands the
gradient of its uses to the owner before the data-parallel reduction, and gets the new value after every update.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.topology import Axis


class SharedWeight:
    """One weight, as one of its two holders sees it.

    Args:
        weight: the parameter here.
        axis: the pipeline's; its first rank owns the weight, its last has the copy.
    """

    def __init__(self, weight: torch.nn.Parameter, axis: Axis) -> None:
        self.weight, self.group = weight, axis.group
        self.owned = axis.rank == 0
        self._peer = dist.get_global_rank(axis.group, axis.size - 1 if self.owned else 0)

    def collect(self, gradient: Tensor) -> None:
        """Add the copy's gradient to the owner's, in place."""
        if self.owned:
            theirs = torch.empty_like(gradient)
            dist.recv(theirs, self._peer, group=self.group)
            gradient.add_(theirs)
        else:
            dist.send(gradient, self._peer, group=self.group)

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the copy the owner's value."""
        if self.owned:
            dist.send(self.weight.detach(), self._peer, group=self.group)
        else:
            dist.recv(self.weight.detach(), self._peer, group=self.group)
