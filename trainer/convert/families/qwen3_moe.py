"""Qwen3-30B-A3B, Qwen3-235B-A22B. Sources: `Qwen3MoeConfig` of transformers; the published config.json."""

from trainer.convert.family import FEED_FORWARD, GROUPED_QUERY, HEADS, NORMS, SIZES, TOP, Family, Setting

FAMILY = Family(
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    settings={
        **SIZES,
        **HEADS,
        "intermediate_size": Setting("dense_hidden_size"),
        "moe_intermediate_size": Setting("moe.expert_hidden_size"),
        "mlp_only_layers": Setting("dense_layers", [], null=[], listed=True),
        "num_experts": Setting("moe.num_experts", also="num_local_experts"),  # which transformers 5 writes
        "norm_topk_prob": Setting("moe.normalize", False),
    },
    always={
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
    },
    ours={"attention.kind": "gqa", "attention.qk_norm": True, "moe.score": "softmax"},
    at_least={"moe.top_k": 2},  # there one weight is normalised to 1, here it stays
    top=TOP,
    layer=lambda _: {**NORMS, **GROUPED_QUERY, **FEED_FORWARD},
)
