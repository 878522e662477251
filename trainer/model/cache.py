"""What attention keeps of the tokens that a model has seen, so that the next ones are run alone.

Shapes: B batch, S new tokens, L tokens kept and new.
"""

import torch
from torch import Tensor, nn


class Cache:
    """Keys and values of one batch of texts, whose rows all have the same number of tokens. For one model.

    What a layer keeps is allocated once, at its first tokens, in their dtype and on their device: grouped-query
    attention keeps keys (after rotary) and values, multi-head latent attention the compressed vector and the rotary
    key, which all heads share.

    Args:
        length: tokens that a text may have.

    Attributes:
        seen: tokens that the model has run; the next one has this position.
    """

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, 0
        self.kept: dict[nn.Module, list[Tensor]] = {}

    def clear(self) -> None:
        """Begin new texts."""
        self.seen = 0

    def advance(self, tokens: int) -> None:
        """All layers have kept their part of so many new tokens."""
        self.seen += tokens

    def extended(self, layer: nn.Module, *new: Tensor, window: int = 0) -> list[Tensor]:
        """Keep ``new``, each (B, S, ·, ·), behind what ``layer`` has kept of the texts so far.

        Args:
            window: positions that one sees, itself included, so that one less is kept; 0: all.

        Returns:
            for each the rows (B, L, ·, ·) that the new tokens may see. They end with the new ones.
        """
        B, S = new[0].shape[:2]
        assert self.seen + S <= self.length, "whoever feeds the model keeps to the length"
        assert not torch.is_grad_enabled(), "no gradient goes through what is kept"
        room = min(self.length, window - 1) if window else self.length
        if layer not in self.kept:
            self.kept[layer] = [x.new_empty(B, room, *x.shape[2:]) for x in new]
        kept = self.kept[layer]
        if not window:
            for rows, x in zip(kept, new, strict=True):
                rows[:, self.seen : self.seen + S] = x
            return [rows[:, : self.seen + S] for rows in kept]
        before = min(self.seen, room)
        seen = [torch.cat([rows[:, :before], x], 1) for rows, x in zip(kept, new, strict=True)]
        after = min(before + S, room)
        for rows, x in zip(kept, seen, strict=True):
            rows[:, :after] = x[:, before + S - after :]
        return seen
