"""Where each tensor of a published file lies in our flattened tensors.

Shapes: E experts, I expert hidden, H hidden.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from backends import select
from trainer.convert.family import Family, Name, Stacked
from trainer.model import MoETransformer
from trainer.model.config import ModelConfig


@dataclass(frozen=True)
class Place:
    """The next ``count`` elements of their tensor are those from ``offset`` on of the flattened tensor ``key``."""

    key: str  # in the checkpoint: "weight.<name>" or "buffer.<name>"
    offset: int
    count: int
    whole: int  # elements of the whole tensor


@dataclass(frozen=True)
class Slot:
    """One of their tensors."""

    name: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    stacked: Stacked | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    @property
    def always_fp32(self) -> bool:
        """Biases of expert selection, whose steps bf16 cannot hold."""
        return self.places[0].key.startswith("buffer.")

    def to_ours(self, rows: Tensor) -> Tensor:
        """Some rows of their tensor as our elements, in a row."""
        return self._in_our_order(rows).flatten()

    def to_theirs(self, flat: Tensor) -> Tensor:
        """All our elements, in a row, as their tensor."""
        if not self.stacked:
            return flat.view(self.shape)
        made = flat.new_empty(self.shape)
        ours = self._in_our_order(made)
        ours.copy_(flat.view(ours.shape))
        return made

    def _in_our_order(self, rows: Tensor) -> Tensor:
        """A view."""
        if self.stacked and self.stacked.transposed:
            rows = rows.transpose(1, 2)
        if self.stacked and self.stacked.interleaved:
            rows = rows.unflatten(1, (-1, 2)).transpose(1, 2)
        return rows


def slots(config: ModelConfig, family: Family) -> dict[str, Slot]:
    """All their tensors of a model by name, in the order of the layers; together they are all of ours."""
    found: dict[str, Slot] = {}
    for key, shape, name, prefix in _ours(config, family):
        for slot in _slots_of(key, shape, name, prefix):
            above = found.get(slot.name)
            found[slot.name] = _below(above, slot) if above else slot
    return found


def copies(config: ModelConfig, family: Family) -> dict[str, str]:
    """Their tensors that repeat one of their others, and which; published files have them.

    A model whose head is tied has one only in some files; exports leave it out.
    """
    names = {ours: str(theirs) for ours, theirs in family.top.items()}
    if config.tie_embeddings:
        names["head.weight"] = names["embed.weight"]
    layers = range(config.num_layers, config.num_layers + config.mtp_layers)
    found = {_prefix(layer) + theirs: names[of] for layer in layers for theirs, of in family.mtp_copies.items()}
    return found | ({str(family.top["head.weight"]): names["embed.weight"]} if config.tie_embeddings else {})


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def _ours(config: ModelConfig, family: Family) -> Iterator[tuple[str, torch.Size, Name, str]]:
    """Key and shape of each of our tensors, its name in the tables, and what stands before that."""
    model = MoETransformer(config, select("cpu").ops, device="meta")
    layer = family.layer(config)
    weights = ((f"weight.{name}", value) for name, value in model.named_parameters())
    buffers = ((f"buffer.{name}", value) for name, value in model.named_buffers())
    for key, value in chain[tuple[str, Tensor]](weights, buffers):
        part, *rest = key.partition(".")[2].split(".")
        if part == "layers":
            yield key, value.shape, layer[".".join(rest[1:])], _prefix(int(rest[0]))
        elif part == "mtp":
            number, inner = config.num_layers + int(rest[0]), ".".join(rest[1:])
            name = layer[inner.removeprefix("layer.")] if inner.startswith("layer.") else family.mtp[inner]
            yield key, value.shape, name, _prefix(number)
        else:
            yield key, value.shape, family.top[f"{part}.{rest[0]}"], ""


def _slots_of(key: str, shape: torch.Size, name: Name, prefix: str) -> Iterator[Slot]:
    whole = shape.numel()
    if isinstance(name, Stacked):
        theirs = (shape[0], *reversed(shape[1:])) if name.transposed else tuple(shape)
        yield Slot(prefix + name.name, theirs, (Place(key, 0, whole, whole),), name)
        return
    halves = name if isinstance(name, tuple) else (name,)
    apart = "{expert}" in halves[0]
    rows, *columns = shape[1:] if apart else shape
    size = (rows // len(halves), *columns)
    count = math.prod(size)
    for expert in range(shape[0] if apart else 1):
        for half, part in enumerate(halves):
            place = Place(key, (expert * len(halves) + half) * count, count, whole)
            yield Slot(prefix + part.format(expert=expert), size, (place,))


def _below(above: Slot, slot: Slot) -> Slot:
    assert above.shape[1:] == slot.shape[1:] and not above.stacked, slot.name
    shape = (above.shape[0] + slot.shape[0], *above.shape[1:])
    return replace(above, shape=shape, places=above.places + slot.places)
