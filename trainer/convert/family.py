"""What there is to say of a family of published models: its tensors' names and its config.json, for both directions.

Each family is one file in `trainer/convert/families/`, an instance of :class:`Family`. Reading it one way gives the
import, the other way the export.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.model.config import ModelConfig


@dataclass(frozen=True)
class Stacked:
    """One tensor of all experts that lies otherwise than ours.

    Attributes:
        name: theirs.
        transposed: matrices are (in, out) there.
        interleaved: rows of gate and up alternate there; here all of gate come first.
    """

    name: str
    transposed: bool = False
    interleaved: bool = False


Name = str | tuple[str, str] | Stacked
"""Their name of one of our tensors. A pair: the two halves of our rows, as in gate and up. ``{expert}`` in a name: each
expert apart. A name that several of ours have: their rows one below the other, in the order of the table."""


@dataclass(frozen=True)
class Setting:
    """A key of config.json and ours.

    Attributes:
        ours: the path in :class:`ModelConfig`, as in ``moe.top_k``.
        default: what a config.json without the key means; None: it must have the key. A function gets the config.json.
        null: our value for null.
        listed: their value lists the first layers, ours is their number.
        also: another name of the key, which is read too.
    """

    ours: str
    default: Any = None
    null: Any = None
    listed: bool = False
    also: str = ""


@dataclass(frozen=True)
class Family:
    """See the fields.

    Attributes:
        model_types: ``model_type`` in config.json; exports have the first.
        architecture: the class in transformers, or in the code that comes with the weights.
        settings: keys of config.json.
        always: keys of config.json that must have these values, if they are there. Exports have them.
        follows: the same for values that depend on the model.
        ours: our keys that are the same in all models of the family.
        at_least: our keys, and their least value.
        top: names of what stands before and behind the layers.
        layer: names inside a layer, after ``model.layers.<number>.``, for a given model.
        mtp: names inside a multi-token-prediction layer, besides those of the layer that it is built around.
        mtp_copies: names there of copies of weights of ours, which exports have and imports compare.
        partial_rotary: a config.json without ``partial_rotary_factor`` means this; None: the family has no such key.
    """

    model_types: tuple[str, ...]
    architecture: str
    settings: Mapping[str, Setting]
    always: Mapping[str, Any]
    ours: Mapping[str, Any]
    top: Mapping[str, Name]
    layer: Callable[[ModelConfig], Mapping[str, Name]]
    mtp: Mapping[str, Name] = field(default_factory=dict)
    mtp_copies: Mapping[str, str] = field(default_factory=dict)
    at_least: Mapping[str, int] = field(default_factory=dict)
    partial_rotary: float | None = None
    follows: Callable[[ModelConfig], Mapping[str, Any]] = lambda _: {}

    @property
    def name(self) -> str:
        return self.model_types[0]


TOP: Mapping[str, Name] = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
NORMS: Mapping[str, Name] = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
GROUPED_QUERY: Mapping[str, Name] = {
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.q.bias": "self_attn.q_proj.bias",
    "attention.k.bias": "self_attn.k_proj.bias",
    "attention.v.bias": "self_attn.v_proj.bias",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
}
FEED_FORWARD: Mapping[str, Name] = {
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": "mlp.down_proj.weight",
    "moe.router.weight": "mlp.gate.weight",
    "moe.experts.gate_up": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "moe.experts.down": "mlp.experts.{expert}.down_proj.weight",
    "moe.shared.gate_up.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "moe.shared.down.weight": "mlp.shared_experts.down_proj.weight",
}
CORRECTION_BIAS: Mapping[str, Name] = {"moe.router.expert_bias": "mlp.gate.e_score_correction_bias"}
MTP: Mapping[str, Name] = {
    "embed_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "project.weight": "eh_proj.weight",  # the embedding's half first, as here
    "norm.weight": "shared_head.norm.weight",
}
MTP_COPIES: Mapping[str, str] = {"embed_tokens.weight": "embed.weight", "shared_head.head.weight": "head.weight"}


def head_dim(theirs: Mapping[str, Any]) -> Any:
    """What a config.json without ``head_dim`` means."""
    return theirs["hidden_size"] // theirs["num_attention_heads"]


SIZES: Mapping[str, Setting] = {
    "vocab_size": Setting("vocab_size"),
    "hidden_size": Setting("hidden_size"),
    "num_hidden_layers": Setting("num_layers"),
    "rms_norm_eps": Setting("norm_eps"),
    "tie_word_embeddings": Setting("tie_embeddings", False),
    "initializer_range": Setting("init_std", 0.02),
    "num_attention_heads": Setting("attention.num_heads"),
    "num_experts_per_tok": Setting("moe.top_k"),
}
HEADS: Mapping[str, Setting] = {
    "num_key_value_heads": Setting("attention.num_kv_heads"),
    "head_dim": Setting("attention.head_dim", head_dim),
}
