"""Ling 2.0: Ling-mini-2.0, Ling-flash-2.0, Ling-1T. Source: models/modeling_bailing_moe_v2.py in inclusionAI/Ling-V2.

Multi-token-prediction layers follow the last of `num_hidden_layers`, as in the published files; an early version of
that code counted them among these.
"""

from trainer.convert.families.bailing_moe import BAILING_SETTINGS, BAILING_TOP, FUSED
from trainer.convert.family import FEED_FORWARD, MTP, NORMS, Family, Setting

FAMILY = Family(
    model_types=("bailing_moe_v2",),
    architecture="BailingMoeV2ForCausalLM",
    settings={
        **BAILING_SETTINGS,
        "use_bias": Setting("attention.output_bias", False),
        "use_qk_norm": Setting("attention.qk_norm", True),
        "num_nextn_predict_layers": Setting("mtp_layers", 0, null=0),
        "n_group": Setting("moe.num_groups", 8),
        "topk_group": Setting("moe.top_groups", 4),
        "routed_scaling_factor": Setting("moe.scale", 1.0),
    },
    always={
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "moe_router_enable_expert_bias": True,
        "score_function": "sigmoid",
    },
    ours={"attention.kind": "gqa", "moe.score": "sigmoid", "moe.expert_bias": True},
    top=BAILING_TOP,
    layer=lambda _: {
        **NORMS,
        **FUSED,
        "attention.q_norm.weight": "attention.query_layernorm.weight",
        "attention.k_norm.weight": "attention.key_layernorm.weight",
        **FEED_FORWARD,
        "moe.router.expert_bias": "mlp.gate.expert_bias",
    },
    mtp={**MTP, "norm.weight": "final_layernorm.weight"},
    partial_rotary=0.5,
)
