"""The shape of a Mixture-of-Experts transformer, as dataclasses that OmegaConf validates.

Every published family is a choice of these values; none is a subclass.
"""

from dataclasses import dataclass
from typing import Optional

from backends.errors import UserError
from backends.key import key
from trainer.config.ranges import COUNT, FINITE, NATURAL, POSITIVE, Rule, check_ranges


@dataclass
class YarnConfig:
    """YaRN context extension (Peng et al. 2023, arXiv 2309.00071). Off while ``factor`` is 1."""

    factor: float = key(1.0, "context extension factor; 1 switches YaRN off")
    original_max_position: int = key(4096, "context length before extension")
    beta_fast: float = key(32.0, "rotations above which a dimension keeps its frequency")
    beta_slow: float = key(1.0, "rotations below which a dimension is fully interpolated")
    mscale: float = key(1.0, "numerator weight of the attention temperature")
    mscale_all_dim: float = key(0.0, "denominator weight; when set, MLA folds mscale(factor)^2 into the softmax scale")
    truncate: bool = key(True, "round the correction range to whole dimensions (off for gpt-oss)")


@dataclass
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

    theta: float = key(10000.0, "base of the rotary frequencies")
    fraction: float = key(1.0, "leading share of each head that is rotated (0.5 in GLM-4.5 and Ling 2.0)")
    interleaved: bool = key(False, "pair neighbouring dimensions (DeepSeek) instead of halves (Llama)")
    yarn: YarnConfig = key(YarnConfig, "YaRN context extension")


@dataclass
class AttentionConfig:
    """Grouped-query attention, or multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kind: str = key("gqa", "gqa or mla", choices=("gqa", "mla"))
    num_heads: int = key(8, "query heads")
    num_kv_heads: int = key(8, "key and value heads (gqa); must divide num_heads")
    head_dim: int = key(64, "dimension of a head (gqa)")
    qk_norm: bool = key(False, "RMSNorm on each query and key head (gqa)")
    bias: bool = key(False, "bias on the query, key and value projections (gqa)")
    output_bias: bool = key(False, "bias on the output projection (gqa)")
    sinks: bool = key(False, "a learned logit per head that takes part in the softmax and has no value (gqa; gpt-oss)")
    window: int = key(0, "positions that one sees, itself included; 0 sees all before it (gqa)")
    full_every: int = key(0, "with a window, layers n-1, 2n-1, ... see everything all the same; 0: none does (gqa)")
    q_lora_rank: int = key(0, "rank of the compressed query (mla); 0 projects queries directly")
    kv_lora_rank: int = key(128, "rank of the compressed keys and values (mla)")
    qk_nope_head_dim: int = key(64, "head dimensions without position (mla)")
    qk_rope_head_dim: int = key(32, "head dimensions with rotary position, one key shared by all heads (mla)")
    v_head_dim: int = key(64, "dimension of a value head (mla)")


@dataclass
class MoEConfig:
    """Router and experts.

    Sources: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2 for sigmoid scores, expert bias, group limits and the
    sequence-wise balance loss; ST-MoE (arXiv 2202.08906) equation 5 for the z-loss.
    """

    num_experts: int = key(8, "routed experts of a MoE layer; 0 makes every layer dense")
    top_k: int = key(2, "experts that a token is sent to")
    expert_hidden_size: int = key(256, "hidden size of one routed expert")
    num_shared_experts: int = key(0, "experts that see every token, run as one of that many times the size")
    score: str = key("softmax", "scoring of the router logits: softmax or sigmoid", choices=("softmax", "sigmoid"))
    normalize: bool = key(True, "make the weights of the chosen experts sum to 1; with top_k 1 the score stays")
    scale: float = key(1.0, "factor on the weights after normalisation")
    router_bias: bool = key(False, "bias on the router's logits (gpt-oss)")
    linear_bias: bool = key(False, "biases on the experts' two projections (gpt-oss)")
    swiglu_limit: Optional[float] = key(
        None, "clamp of gpt-oss: experts compute min(g, c) sigmoid(1.702 min(g, c)) (clip(u, -c, c) + 1); null: SwiGLU"
    )
    num_groups: int = key(1, "expert groups for group-limited selection; 1 switches it off")
    top_groups: int = key(1, "groups that a token may use")
    expert_bias: bool = key(False, "loss-free balancing: a bias, used for selection only, moved once a step")
    expert_bias_rate: float = key(0.001, "how far the expert bias moves at each step")
    aux_loss: float = key(0.0, "weight of the sequence-wise balance loss")
    z_loss: float = key(0.0, "weight of the router z-loss")
    capacity_factor: Optional[float] = key(
        None, "tokens that an expert takes, as a multiple of the even share of each sequence; null never drops"
    )


@dataclass
class ModelConfig:
    """One MoE language model: pre-norm transformer, first layers dense, the rest Mixture-of-Experts."""

    vocab_size: int = key(8192, "entries of the embedding and of the head")
    hidden_size: int = key(512, "width of the residual stream")
    num_layers: int = key(8, "transformer layers, dense ones included")
    dense_layers: int = key(0, "leading layers with a dense feed-forward instead of experts")
    dense_hidden_size: int = key(1536, "hidden size of the dense feed-forward")
    attention: AttentionConfig = key(AttentionConfig, "attention")
    rope: RopeConfig = key(RopeConfig, "rotary position embedding")
    moe: MoEConfig = key(MoEConfig, "router and experts")
    mtp_layers: int = key(0, "multi-token-prediction layers (DeepSeek-V3 section 2.2)")
    mtp_loss: float = key(0.3, "weight of the multi-token-prediction loss, averaged over its layers")
    norm_eps: float = key(1e-6, "epsilon of RMSNorm")
    tie_embeddings: bool = key(False, "share the embedding with the head")
    normalize_head: bool = key(False, "give each column of the head's weight unit norm before use (NormHead of Ling)")
    residual_fp32: bool = key(False, "keep the residual stream in fp32 under bf16")
    init_std: float = key(0.02, "standard deviation of the initial weights")

    def is_moe(self, layer: int) -> bool:
        """Whether layer number ``layer`` (from 0; MTP layers follow the last) holds experts."""
        return self.moe.num_experts > 0 and layer >= self.dense_layers

    def window_of(self, layer: int) -> int:
        """How many positions one sees in layer number ``layer``, itself included; 0: all."""
        every = self.attention.full_every
        return 0 if every and (layer + 1) % every == 0 else self.attention.window

    def moe_names(self) -> list[str]:
        """The numbers, as strings, of all layers that hold experts."""
        return [str(layer) for layer in range(self.num_layers + self.mtp_layers) if self.is_moe(layer)]

    def loss_names(self) -> list[str]:
        """Of the losses that training meters, in the order of reports."""
        moe = bool(self.moe_names())
        wanted = {
            "lm_loss": True,
            "mtp_loss": self.mtp_layers > 0,
            "aux_loss": moe and self.moe.aux_loss > 0,
            "z_loss": moe and self.moe.z_loss > 0,
        }
        return [name for name, present in wanted.items() if present]

    def validate(self, where: str) -> None:
        """Raise :class:`UserError` naming ``where`` (the config file) and the key that cannot work."""
        moe, attention = self.moe, self.attention

        def refuse(name: str, problem: str, remedy: str) -> None:
            raise UserError(f"{where}: model.{name}: {problem}; {remedy}")

        check_ranges(self, _RANGES, where, "model.")
        check_ranges(self, _GQA_RANGES if attention.kind == "gqa" else _MLA_RANGES, where, "model.")
        if moe.num_experts > 0:
            check_ranges(self, _MOE_RANGES, where, "model.")
        if not 0 <= self.dense_layers <= self.num_layers:
            refuse("dense_layers", f"is {self.dense_layers}", f"it must lie between 0 and num_layers={self.num_layers}")
        if attention.kind == "gqa" and (attention.num_kv_heads < 1 or attention.num_heads % attention.num_kv_heads):
            refuse(
                "attention.num_kv_heads",
                f"{attention.num_kv_heads} does not divide num_heads={attention.num_heads}",
                "choose a divisor",
            )
        if attention.kind == "mla":
            for name in _GQA_ONLY:
                if getattr(attention, name):
                    refuse(f"attention.{name}", "is for attention.kind=gqa", "leave it out with mla")
        rotated = attention.qk_rope_head_dim if attention.kind == "mla" else attention.head_dim * self.rope.fraction
        if rotated % 2:
            name = "attention.qk_rope_head_dim" if attention.kind == "mla" else "rope.fraction"
            refuse(name, f"rotates {rotated:g} dimensions of a head", "the number must be even and above 0")
        if moe.num_experts > 0:
            if not 1 <= moe.top_k <= moe.num_experts:
                refuse(
                    "moe.top_k",
                    f"{moe.top_k} is more than num_experts={moe.num_experts}" if moe.top_k > 0 else f"is {moe.top_k}",
                    f"set it between 1 and {moe.num_experts}",
                )
            if moe.num_groups < 1 or moe.num_experts % moe.num_groups:
                refuse(
                    "moe.num_groups",
                    f"{moe.num_groups} does not divide num_experts={moe.num_experts}",
                    "choose a divisor",
                )
            if not 1 <= moe.top_groups <= moe.num_groups:
                refuse("moe.top_groups", f"is {moe.top_groups}", f"set it between 1 and num_groups={moe.num_groups}")
            if moe.top_groups * (moe.num_experts // moe.num_groups) < moe.top_k:
                refuse(
                    "moe.top_k",
                    f"{moe.top_k} experts do not fit in top_groups={moe.top_groups} groups",
                    "raise top_groups or lower top_k",
                )


_RANGES = {
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "num_layers": COUNT,
    "dense_hidden_size": COUNT,
    "mtp_layers": NATURAL,
    "mtp_loss": NATURAL,
    "norm_eps": POSITIVE,
    "init_std": POSITIVE,
    "attention.num_heads": COUNT,
    "rope.theta": POSITIVE,
    "rope.fraction": Rule(lambda value: 0 < value <= 1, "it must be above 0 and at most 1"),
    "rope.yarn.factor": Rule(lambda value: value >= 1, "it must be at least 1; 1 switches YaRN off"),
    "rope.yarn.original_max_position": COUNT,
    "rope.yarn.beta_fast": FINITE,
    "rope.yarn.beta_slow": FINITE,
    "rope.yarn.mscale": FINITE,
    "rope.yarn.mscale_all_dim": FINITE,
    "moe.num_experts": NATURAL,
}
_GQA_ONLY = ("qk_norm", "bias", "output_bias", "sinks", "window", "full_every")
_GQA_RANGES = {"attention.head_dim": COUNT, "attention.window": NATURAL, "attention.full_every": NATURAL}
_MLA_RANGES = {
    "attention.q_lora_rank": NATURAL,
    "attention.kv_lora_rank": COUNT,
    "attention.qk_nope_head_dim": NATURAL,
    "attention.qk_rope_head_dim": COUNT,
    "attention.v_head_dim": COUNT,
}
_MOE_RANGES = {
    "moe.expert_hidden_size": COUNT,
    "moe.num_shared_experts": NATURAL,
    "moe.scale": POSITIVE,
    "moe.swiglu_limit": Rule(lambda value: value is None or value > 0, "set it above 0, or to null for plain SwiGLU"),
    "moe.expert_bias_rate": NATURAL,
    "moe.aux_loss": NATURAL,
    "moe.z_loss": NATURAL,
    "moe.capacity_factor": Rule(
        lambda value: value is None or value > 0, "set it above 0, or to null, which drops no token"
    ),
}
