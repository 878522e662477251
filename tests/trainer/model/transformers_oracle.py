"""The same model in transformers: its config, its names for our tensors, and a way to run it in fp64."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trainer.model import ModelConfig
from trainer.model.rope import rotated_dims, rotations

# Their name, ours; applied one after the other. Gate and up are one weight here, gate first.
COMMON = [
    ("lm_head.", "head."),
    ("model.", ""),
    ("embed_tokens.", "embed."),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.", "attention."),
    ("o_proj.", "out."),
    ("mlp.gate.e_score_correction_bias", "moe.router.expert_bias"),
    ("mlp.gate.", "moe.router."),
    ("mlp.router.", "moe.router."),
    ("mlp.experts.gate_up_proj", "moe.experts.gate_up"),
    ("mlp.experts.down_proj", "moe.experts.down"),
    ("mlp.shared_experts.", "moe.shared."),
    ("down_proj.", "down."),
]
GROUPED_QUERY = [("q_proj.", "q."), ("k_proj.", "k."), ("v_proj.", "v.")]
LATENT = [
    ("q_proj.", "q_up."),
    ("q_a_proj.", "q_down."),
    ("q_a_layernorm.", "q_norm."),
    ("q_b_proj.", "q_up."),
    ("kv_a_proj_with_mqa.", "kv_down."),
    ("kv_a_layernorm.", "kv_norm."),
    ("kv_b_proj.", "kv_up."),
]


def tensor_of(theirs: str, ours: Mapping[str, Tensor], family: str, kind: str) -> Tensor:
    """Our tensor, or the half of it, that transformers calls ``theirs``; a view, perhaps with a dimension more."""
    name = theirs
    for before, after in COMMON + (LATENT if kind == "mla" else GROUPED_QUERY):
        name = name.replace(before, after)
    if family == "gpt-oss" and ".experts." in name:
        value = ours[name]
        if "gate_up" in name:
            value = value.unflatten(1, (2, -1)).movedim(1, -1)  # their columns alternate between gate and up
        return value.transpose(1, 2) if name.endswith("down") else value.movedim(2, 1) if value.dim() == 4 else value
    for half, part in enumerate((".gate_proj.", ".up_proj.")):
        if part in name:
            return ours[name.replace(part, ".gate_up.")].chunk(2)[half]
    return ours[name]


def their_rope(config: ModelConfig) -> dict[str, object]:
    yarn = config.rope.yarn
    if yarn.factor <= 1:
        return {"rope_type": "default", "rope_theta": config.rope.theta}
    return {
        "rope_type": "yarn",
        "rope_theta": config.rope.theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "truncate": yarn.truncate,
    }


def their_model(family: str, config: ModelConfig) -> PreTrainedModel:
    """The transformers model of this shape, its norms, router and attention in the plain ("eager") implementation."""
    shape, moe = config.attention, config.moe
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.dense_hidden_size,
        "moe_intermediate_size": moe.expert_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": their_rope(config),
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    deepseek_router = {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "routed_scaling_factor": moe.scale,
        "first_k_dense_replace": config.dense_layers,
        "num_mtp_layers": 0,
    }
    grouped_query = {
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "attention_bias": shape.bias,
    }
    if family == "qwen3":
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common,
                **grouped_query,
                num_experts=moe.num_experts,
                mlp_only_layers=list(range(config.dense_layers)),
            )
        )
    if family == "glm4":
        common["rope_parameters"] = {**their_rope(config), "partial_rotary_factor": config.rope.fraction}
        return Glm4MoeForCausalLM(
            Glm4MoeConfig(**common, **grouped_query, **deepseek_router, use_qk_norm=shape.qk_norm)
        )
    if family == "gpt-oss":
        return GptOssForCausalLM(
            GptOssConfig(
                **{**common, "intermediate_size": moe.expert_hidden_size},
                **grouped_query,
                num_local_experts=moe.num_experts,
                sliding_window=shape.window,
                swiglu_limit=moe.swiglu_limit,
            )
        )
    assert family == "deepseek"
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **common,
            **deepseek_router,
            num_key_value_heads=shape.num_heads,
            q_lora_rank=shape.q_lora_rank or None,
            kv_lora_rank=shape.kv_lora_rank,
            qk_nope_head_dim=shape.qk_nope_head_dim,
            qk_rope_head_dim=shape.qk_rope_head_dim,
            v_head_dim=shape.v_head_dim,
            rope_interleave=config.rope.interleaved,
        )
    )


class _Wide:
    """``torch`` with fp64 where a module asks for fp32."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


class _OurTables(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        dims = rotated_dims(self.config.attention, self.config.rope)
        cos, sin = rotations(self.config.rope, dims, position_ids)
        if not self.config.attention.sinks:  # gpt-oss takes each value once
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        return cos.to(x.dtype), sin.to(x.dtype)


@contextmanager
def in_fp64(model: PreTrainedModel, config: ModelConfig) -> Iterator[None]:
    """Run ``model`` in fp64 throughout.

    transformers computes norms, router and softmax in fp32 whatever the weights' dtype, and sine and cosine from
    fp32 angles that differ from ours in the last bit. So that the rest can be compared to 1e-13, its module sees a
    ``torch`` whose float32 is float64, and it gets our tables; those are compared on their own in test_model_rope.
    """
    module = sys.modules[type(model).__module__]
    model.double()
    tables, model.model.rotary_emb = model.model.rotary_emb, _OurTables(config)
    module.torch = _Wide()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.torch = torch  # type: ignore[attr-defined]
        model.model.rotary_emb = tables
