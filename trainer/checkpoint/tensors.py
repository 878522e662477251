"""What a checkpoint holds: each rank's pieces under full names, and the copies that a save in the background writes."""

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine import Engine
from trainer.checkpoint.flat import FlatPiece
from trainer.model import MoETransformer


def to_save(model: MoETransformer, engine: Engine) -> dict[str, Tensor]:
    """What this rank writes: each element of the state is written by one rank."""
    tensors = _pieces(engine) | _random()
    if engine.topology.dp.rank == 0:  # replicas hold the same buffers
        tensors |= _buffers(model)
    return tensors


def to_load(model: MoETransformer, engine: Engine) -> dict[str, Tensor]:
    """What this rank reads, in place: all that it holds."""
    return _pieces(engine) | _random() | _buffers(model)


def initial(model: MoETransformer, engine: Engine) -> dict[str, Tensor]:
    """What a new run reads of another's checkpoint, in place: weights and buffers."""
    pieces = {key: piece for key, piece in _pieces(engine).items() if key.startswith("weight.")}
    return pieces | _buffers(model)


def weights(model: MoETransformer) -> dict[str, Tensor]:
    """Weights, of any dtype, and buffers of a whole model, in place."""
    flat = {name: parameter.detach().view(-1) for name, parameter in model.named_parameters()}
    return {f"weight.{name}": FlatPiece.of(values, 0, len(values)) for name, values in flat.items()} | _buffers(model)


def random_name() -> str:
    """The name of this rank's random state."""
    return f"rng.{dist.get_rank()}"


def _pieces(engine: Engine) -> dict[str, Tensor]:
    """Master weights and moments."""
    return {
        f"{kind}.{shard.name}": FlatPiece.of(values, shard.offset, shard.whole)
        for shard in engine.shards()
        for kind, values in shard.state.items()
    }


def _random() -> dict[str, Tensor]:
    return {random_name(): torch.get_rng_state()}


def _buffers(model: MoETransformer) -> dict[str, Tensor]:
    return {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}


class Staging:
    """Memory of the host that holds a copy of the state while it is written; allocated once, at the first save.

    Each tensor has memory of its own, because DCP copies a tensor that is part of a larger one, and a copy by the
    writing thread would start a second pool of OpenMP threads: with more of them than cores libgomp stops spinning
    at barriers for the rest of the process (a step of two threads took 1.2 s instead of 0.45 s ever after).
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now; valid until the next call."""
        for name, tensor in tensors.items():
            if name not in self._copies:
                pinned = tensor.device.type != "cpu"  # a device copies to pinned memory at full speed
                self._copies[name] = torch.empty(plain(tensor).shape, dtype=tensor.dtype, pin_memory=pinned)
            self._copies[name].copy_(plain(tensor), non_blocking=True)
        if any(tensor.device.type != "cpu" for tensor in tensors.values()):
            torch.accelerator.synchronize()
        return {
            name: FlatPiece.of(self._copies[name], tensor.offset, tensor.whole)
            if isinstance(tensor, FlatPiece)
            else self._copies[name]
            for name, tensor in tensors.items()
        }


def plain(tensor: Tensor) -> Tensor:
    """A piece as an ordinary tensor."""
    return tensor.as_subclass(torch.Tensor)
