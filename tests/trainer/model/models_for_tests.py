"""Tiny models with weights that hide nothing, and one way to say how far two tensors lie apart."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from backends import select
from trainer.config.load import load_config
from trainer.model import ModelConfig, MoETransformer, Share
from trainer.model.config import AttentionConfig, MoEConfig
from trainer.model.context import Context, Meters

MODELS = Path(__file__).parents[3] / "configs" / "models"
OPS = select("cpu").ops


def gqa(**more) -> AttentionConfig:
    return AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": True, **more})


def mla(**more) -> AttentionConfig:
    sizes = {"q_lora_rank": 10, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    return AttentionConfig(kind="mla", **{"num_heads": 3, **sizes, **more})


def moe(**more) -> MoEConfig:
    base = {"num_experts": 8, "top_k": 3, "expert_hidden_size": 6, "num_shared_experts": 1, "score": "sigmoid"}
    return MoEConfig(**{**base, "expert_bias": True, "scale": 1.7, **more})


def config(**more) -> ModelConfig:
    base = {"vocab_size": 29, "hidden_size": 12, "num_layers": 3, "dense_layers": 1, "dense_hidden_size": 14}
    return ModelConfig(**{**base, "attention": gqa(), "moe": moe(), **more})


def published(name: str, *overrides: str) -> ModelConfig:
    """The model of a config in configs/models, for the meta device."""
    return load_config(str(MODELS / f"{name}.yaml"), list(overrides)).model


def fill(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Norms around 1, biases and expert biases around 0, matrices large enough that every part matters."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if name.endswith("norm.weight"):
        noise = 1 + 0.3 * noise
    elif name.endswith("bias"):
        noise = 0.2 * noise
    elif "embed" not in name:
        noise = noise * 1.2 / value.shape[-1] ** 0.5
    with torch.no_grad():
        value.copy_(noise)


def build(
    shape: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0, recompute: bool = False
) -> MoETransformer:
    """A model on the CPU, every tensor drawn at random: norms and biases too, or their bugs would not show."""
    shape.validate("test")
    model = MoETransformer(shape, OPS, device="cpu", dtype=dtype, recompute=recompute)
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        fill(name, value, generator)
    return model


def some_tokens(shape: ModelConfig, rows: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and the labels one to their left, the last ignored."""
    tokens = torch.randint(shape.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.cat([tokens[:, 1:], torch.full((rows, 1), -100)], 1)


def context(sequences: float = 1.0, tokens: float = 1.0) -> Context:
    """For parts of a model that use no positions."""
    return Context(torch.empty(0), torch.empty(0), None, Share(tokens=tokens, sequences=sequences), Meters())


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest entry of ``theirs``."""
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0, "a tensor of zeros compares nothing"
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    apart = {name: distance(ours[name], theirs[name]) for name in ours}
    worst = max(apart, key=lambda name: apart[name])
    assert apart[worst] <= tolerance, f"{worst} lies {apart[worst]:.2e} apart"
