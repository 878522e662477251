"""GLM-4.5 and GLM-4.5-Air. Sources: `Glm4MoeConfig` of transformers; the published config.json."""

from trainer.convert.family import (
    CORRECTION_BIAS,
    FEED_FORWARD,
    GROUPED_QUERY,
    HEADS,
    MTP,
    MTP_COPIES,
    NORMS,
    SIZES,
    TOP,
    Family,
    Setting,
)

FAMILY = Family(
    model_types=("glm4_moe",),
    architecture="Glm4MoeForCausalLM",
    settings={
        **SIZES,
        **HEADS,
        "intermediate_size": Setting("dense_hidden_size"),
        "moe_intermediate_size": Setting("moe.expert_hidden_size"),
        "first_k_dense_replace": Setting("dense_layers"),
        "num_nextn_predict_layers": Setting("mtp_layers", 0, null=0),
        "attention_bias": Setting("attention.bias", False),  # of queries, keys and values
        "use_qk_norm": Setting("attention.qk_norm", False),
        "n_routed_experts": Setting("moe.num_experts"),
        "n_shared_experts": Setting("moe.num_shared_experts"),
        "n_group": Setting("moe.num_groups", 1),
        "topk_group": Setting("moe.top_groups", 1),
        "norm_topk_prob": Setting("moe.normalize", True),
        "routed_scaling_factor": Setting("moe.scale"),
    },
    always={"hidden_act": "silu"},
    ours={"attention.kind": "gqa", "moe.score": "sigmoid", "moe.expert_bias": True},
    at_least={"moe.num_shared_experts": 1, "moe.top_k": 2},
    top=TOP,
    layer=lambda _: {**NORMS, **GROUPED_QUERY, **FEED_FORWARD, **CORRECTION_BIAS},
    mtp=MTP,
    mtp_copies=MTP_COPIES,
    partial_rotary=0.5,
)
