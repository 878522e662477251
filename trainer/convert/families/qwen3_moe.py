"""Qwen3-30B-A3B, Qwen3-235B-A22B. Sources: `Qwen3MoeConfig` of transformers; the published config.json."""

from trainer.convert.family import FEED_FORWARD, GROUPED_QUERY, NORMS, SIZES, TOP, Family, Setting

FAMILY = Family(
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    settings={
        **SIZES,
        "intermediate_size": Setting("dense_hidden_size"),
        "moe_intermediate_size": Setting("moe.expert_hidden_size"),
        "mlp_only_layers": Setting("dense_layers", []),
        "num_key_value_heads": Setting("attention.num_kv_heads"),
        "head_dim": Setting("attention.head_dim"),
        "num_experts": Setting("moe.num_experts"),
        "norm_topk_prob": Setting("moe.normalize", False),
    },
    always={
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
    },
    ours={"attention.kind": "gqa", "attention.qk_norm": True, "moe.score": "softmax"},
    top=TOP,
    layer=lambda _: {**NORMS, **GROUPED_QUERY, **FEED_FORWARD},
)
