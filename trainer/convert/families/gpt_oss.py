"""gpt-oss-20b and gpt-oss-120b, in bf16. Sources: openai/gpt-oss; `GptOssConfig` of transformers.

The published files hold mxfp4 experts; transformers makes bf16 of them.
"""

from collections.abc import Mapping
from typing import Any

from trainer.convert.family import GROUPED_QUERY, HEADS, NORMS, SIZES, TOP, Family, Setting, Stacked
from trainer.model.config import ModelConfig


def _layer_types(config: ModelConfig) -> Mapping[str, Any]:
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    return {"layer_types": ["sliding_attention" if window else "full_attention" for window in windows]}


FAMILY = Family(
    model_types=("gpt_oss",),
    architecture="GptOssForCausalLM",
    settings={
        **SIZES,
        **HEADS,
        "intermediate_size": Setting("moe.expert_hidden_size"),
        "num_local_experts": Setting("moe.num_experts"),
        "sliding_window": Setting("attention.window"),
        "swiglu_limit": Setting("moe.swiglu_limit", 7.0),
    },
    always={"hidden_act": "silu", "attention_bias": True, "swiglu_alpha": 1.702},
    follows=_layer_types,
    ours={
        "attention.kind": "gqa",
        "attention.bias": True,
        "attention.output_bias": True,
        "attention.sinks": True,
        "attention.full_every": 2,
        "moe.score": "softmax",  # and normalised: the softmax over the chosen experts
        "moe.router_bias": True,
        "moe.linear_bias": True,
    },
    at_least={"attention.window": 1, "moe.top_k": 2},  # there one weight is normalised to 1, here it stays
    top=TOP,
    layer=lambda _: {
        **NORMS,
        **GROUPED_QUERY,
        "attention.out.bias": "self_attn.o_proj.bias",
        "attention.sinks": "self_attn.sinks",
        "moe.router.weight": "mlp.router.weight",
        "moe.router.bias": "mlp.router.bias",
        "moe.experts.gate_up": Stacked("mlp.experts.gate_up_proj", transposed=True, interleaved=True),
        "moe.experts.gate_up_bias": Stacked("mlp.experts.gate_up_proj_bias", interleaved=True),
        "moe.experts.down": Stacked("mlp.experts.down_proj", transposed=True),
        "moe.experts.down_bias": "mlp.experts.down_proj_bias",
    },
)
