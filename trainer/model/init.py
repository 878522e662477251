"""Initial weights by name: the same values whatever the layout, the device or the order of construction."""

import hashlib

import torch
from torch import Tensor

from trainer.model.model import MoETransformer
from trainer.model.moe import Experts


def materialize(model: MoETransformer, seed: int, device: torch.device | str) -> None:
    """Give a meta model real weights on ``device``.

    Matrices are normal with ``config.init_std``, norms 1, biases and expert biases 0. Each tensor is drawn on the
    CPU from a generator seeded by (seed, full name), each expert from one of its own, so that a rank draws only
    what it holds and every layout and device starts from the same model.
    """
    model.to_empty(device=device)
    if model.config.tie_embeddings and hasattr(model, "head"):
        # to_empty makes two tensors of a shared one
        model.head.weight = model.embed.weight  # type: ignore[assignment]
    experts = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, Experts)}
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            holder = next((module for prefix, module in experts.items() if name.startswith(prefix)), None)
            if name.endswith("bias"):
                value.zero_()
            elif holder is not None:
                for index, expert in enumerate(value):
                    _draw(expert, f"{name}.{holder.first + index}", seed, model.config.init_std)
            elif name.endswith("norm.weight"):
                value.fill_(1)
            else:
                _draw(value, name, seed, model.config.init_std)


def _draw(value: Tensor, name: str, seed: int, std: float) -> None:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value.copy_(torch.empty(value.shape, dtype=torch.float32).normal_(0, std, generator=generator))
