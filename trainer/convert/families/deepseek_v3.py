"""DeepSeek-V3 and models of its shape: Kimi-K2, TeleChat3-105B-A4.7B.

Sources: arXiv 2412.19437; the published config.json and weight map; `DeepseekV3Config` of transformers.
"""

from collections.abc import Mapping

from trainer.convert.family import (
    CORRECTION_BIAS,
    FEED_FORWARD,
    MTP,
    MTP_COPIES,
    NORMS,
    SIZES,
    TOP,
    Family,
    Name,
    Setting,
)
from trainer.model.config import ModelConfig

_QUERIES: Mapping[bool, Mapping[str, Name]] = {
    True: {
        "attention.q_down.weight": "self_attn.q_a_proj.weight",
        "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
        "attention.q_up.weight": "self_attn.q_b_proj.weight",
    },
    False: {"attention.q_up.weight": "self_attn.q_proj.weight"},
}


def _layer(config: ModelConfig) -> Mapping[str, Name]:
    return {
        **NORMS,
        **_QUERIES[config.attention.q_lora_rank > 0],
        "attention.kv_down.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
        "attention.kv_up.weight": "self_attn.kv_b_proj.weight",
        "attention.out.weight": "self_attn.o_proj.weight",
        **FEED_FORWARD,
        **CORRECTION_BIAS,
    }


FAMILY = Family(
    # TeleChat3-105B-A4.7B is published as deepseek_v3. The dense TeleChat3-36B is telechat3 and has other keys.
    model_types=("deepseek_v3", "kimi_k2", "telechat3"),
    architecture="DeepseekV3ForCausalLM",
    settings={
        **SIZES,
        "intermediate_size": Setting("dense_hidden_size"),
        "moe_intermediate_size": Setting("moe.expert_hidden_size"),
        "first_k_dense_replace": Setting("dense_layers"),
        "num_nextn_predict_layers": Setting("mtp_layers", 0, null=0),
        "q_lora_rank": Setting("attention.q_lora_rank", null=0),
        "kv_lora_rank": Setting("attention.kv_lora_rank"),
        "qk_nope_head_dim": Setting("attention.qk_nope_head_dim"),
        "qk_rope_head_dim": Setting("attention.qk_rope_head_dim"),
        "v_head_dim": Setting("attention.v_head_dim"),
        "rope_interleave": Setting("rope.interleaved", True),
        "n_routed_experts": Setting("moe.num_experts"),
        "n_shared_experts": Setting("moe.num_shared_experts"),
        "n_group": Setting("moe.num_groups"),
        "topk_group": Setting("moe.top_groups"),
        "norm_topk_prob": Setting("moe.normalize", True),
        "routed_scaling_factor": Setting("moe.scale"),
    },
    always={
        "hidden_act": "silu",
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    },
    follows=lambda config: {"num_key_value_heads": config.attention.num_heads},
    ours={"attention.kind": "mla", "moe.score": "sigmoid", "moe.expert_bias": True},
    at_least={"moe.num_shared_experts": 1, "moe.top_k": 2},
    top=TOP,
    layer=_layer,
    mtp=MTP,
    mtp_copies=MTP_COPIES,
)
