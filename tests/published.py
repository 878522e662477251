"""Published weights for tests: folders in the Hugging Face format, made of random numbers, and a way to compare two."""

import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from backends import select
from trainer.checkpoint.folder import CONFIG
from trainer.checkpoint.loading import load_weights
from trainer.config.load import load_config
from trainer.convert.families import FAMILIES
from trainer.convert.names import copies, slots
from trainer.convert.settings import config_to
from trainer.model import ModelConfig, MoETransformer
from trainer.model.config import AttentionConfig, MoEConfig, RopeConfig, YarnConfig

_MLA = {"q_lora_rank": 6, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 5}
_SIZES = {"vocab_size": 300, "hidden_size": 12, "num_layers": 3, "dense_layers": 1, "dense_hidden_size": 10}
_SIGMOID = {"score": "sigmoid", "expert_bias": True, "num_shared_experts": 1}


def _moe(**more: object) -> MoEConfig:
    return MoEConfig(**{"num_experts": 6, "top_k": 2, "expert_hidden_size": 7, **more})  # type: ignore[arg-type]


def _gqa(**more: object) -> AttentionConfig:
    return AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, **more})  # type: ignore[arg-type]


# One model of each family, with all that the family has; no two sizes that could be confused are equal.
SHAPES = {
    "deepseek_v3": ModelConfig(
        **_SIZES,
        attention=AttentionConfig(kind="mla", num_heads=2, **_MLA),
        rope=RopeConfig(interleaved=True),
        moe=_moe(**_SIGMOID, num_groups=3, top_groups=2, scale=2.5),
        mtp_layers=2,
    ),
    "qwen3_moe": ModelConfig(**_SIZES, attention=_gqa(qk_norm=True), moe=_moe(normalize=False)),
    "glm4_moe": ModelConfig(
        **_SIZES,
        attention=_gqa(qk_norm=True, bias=True),
        rope=RopeConfig(fraction=0.5),
        moe=_moe(**_SIGMOID),
        mtp_layers=1,
        norm_eps=1e-5,
    ),
    "gpt_oss": ModelConfig(
        **{**_SIZES, "dense_layers": 0},
        attention=_gqa(bias=True, output_bias=True, sinks=True, window=3, full_every=2),
        rope=RopeConfig(theta=150000.0, yarn=YarnConfig(factor=4.0, original_max_position=16, truncate=False)),
        moe=_moe(router_bias=True, linear_bias=True, swiglu_limit=0.7),
    ),
    "bailing_moe": ModelConfig(
        **{**_SIZES, "dense_layers": 0},
        attention=_gqa(bias=True, output_bias=True),
        moe=_moe(num_shared_experts=2),
        normalize_head=True,
    ),
    "bailing_moe_v2": ModelConfig(
        **_SIZES,
        attention=_gqa(qk_norm=True, bias=True, output_bias=True),
        rope=RopeConfig(fraction=0.5),
        moe=_moe(**_SIGMOID, num_groups=2, top_groups=1, scale=2.5),
        mtp_layers=1,
    ),
}


def publish(folder: Path, family: str, config: ModelConfig, dtype: torch.dtype = torch.float32, files: int = 3) -> Path:
    """A folder of such a model's random weights, in several files, its tensors shared out in no useful order."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    named = slots(config, FAMILIES[family])
    values = {}
    for name, slot in named.items():
        value = torch.randn(slot.shape, generator=generator) * 0.5
        values[name] = value if slot.always_fp32 else value.to(dtype)
    for name, of in copies(config, FAMILIES[family]).items():
        values[name] = values[of].clone()
    keys = config_to(config, FAMILIES[family], "test") | {"max_position_embeddings": 64, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(keys))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    write_tokenizer(folder / "tokenizer.json")
    where = {name: f"model-{number % files + 1:05}-of-{files:05}.safetensors" for number, name in enumerate(values)}
    for file in set(where.values()):
        save_file({name: values[name] for name in values if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE whose token 0 ends a document."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["the expert of a token"], trainer=trainer)
    inner.save(str(path))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a published folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def model_of(checkpoint: Path) -> MoETransformer:
    """The fp32 model of a checkpoint folder."""
    config = load_config(str(checkpoint / CONFIG), []).model
    model = MoETransformer(config, select("cpu").ops, device="cpu")
    load_weights(checkpoint, model)
    return model
