"""Ling-lite and Ling-plus. Source: models/ in inclusionAI/Ling."""

from collections.abc import Mapping

from trainer.convert.family import FEED_FORWARD, HEADS, NORMS, SIZES, TOP, Family, Name, Setting

BAILING_TOP: Mapping[str, Name] = {**TOP, "embed.weight": "model.word_embeddings.weight"}
FUSED: Mapping[str, Name] = {
    "attention.q.weight": "attention.query_key_value.weight",
    "attention.k.weight": "attention.query_key_value.weight",
    "attention.v.weight": "attention.query_key_value.weight",
    "attention.q.bias": "attention.query_key_value.bias",
    "attention.k.bias": "attention.query_key_value.bias",
    "attention.v.bias": "attention.query_key_value.bias",
    "attention.out.weight": "attention.dense.weight",
    "attention.out.bias": "attention.dense.bias",
}
BAILING_SETTINGS: Mapping[str, Setting] = {
    **SIZES,
    **HEADS,
    "intermediate_size": Setting("dense_hidden_size"),
    "moe_intermediate_size": Setting("moe.expert_hidden_size"),
    "first_k_dense_replace": Setting("dense_layers", 0),
    "use_qkv_bias": Setting("attention.bias", False),
    "num_experts": Setting("moe.num_experts"),
    "num_shared_experts": Setting("moe.num_shared_experts", 0, null=0),
}

FAMILY = Family(
    model_types=("bailing_moe",),
    architecture="BailingMoeForCausalLM",
    settings={
        **BAILING_SETTINGS,
        "use_bias": Setting("attention.output_bias", True),
        "norm_head": Setting("normalize_head", False),
        "norm_topk_prob": Setting("moe.normalize", True),
    },
    always={"hidden_act": "silu", "norm_softmax": False, "use_sliding_window": False},
    ours={"attention.kind": "gqa", "moe.score": "softmax"},
    top=BAILING_TOP,
    layer=lambda _: {**NORMS, **FUSED, **FEED_FORWARD},
)
