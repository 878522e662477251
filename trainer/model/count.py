"""Parameters by part, and the floating-point operations of a token."""

from typing import NamedTuple

from torch import Tensor, nn

from backends import select
from trainer.model.config import ModelConfig
from trainer.model.model import MoETransformer

_PARTS = {  # a segment of the parameter's name, and what it belongs to
    "embed": "embedding",
    "attention": "attention",
    "mlp": "dense feed-forward",
    "experts": "routed experts",
    "shared": "shared experts",
    "router": "router",
    "norm": "norms",
    "head": "head",
    "mtp": "multi-token prediction",
}


class Count(NamedTuple):
    """Parameters held, and those that one token is multiplied with or looks up."""

    total: int
    active: int


def count_parameters(model: MoETransformer) -> dict[str, Count]:
    """Parameters of each part of a model, on any device, "meta" too.

    A token uses one row of the embedding and ``top_k`` of the routed experts. A head that is tied to the embedding
    is counted there, and its use with it. Multi-token prediction is one part: its layers with all that is in them.
    """
    counts = dict.fromkeys(_PARTS.values(), Count(0, 0))
    for name, parameter in model.named_parameters():
        part, active = _part(name), _used(name, parameter, model.config)
        if name == "embed.weight" and not model.config.tie_embeddings:
            active = parameter.shape[1]
        counts[part] = Count(counts[part].total + parameter.numel(), counts[part].active + active)
    return {part: count for part, count in counts.items() if count.total}


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of one training token, forward and backward: 6 N + 3 L S heads (d_qk + d_v).

    N counts the weights of every matrix that a token is multiplied with: projections, router, ``top_k`` routed
    experts, shared experts, and the head once for the model and once for each multi-token-prediction layer. The
    embedding lookup, norms and biases are left out. Each weight costs a multiplication and an addition in the
    forward pass and twice that in the backward pass.

    The second term is the attention of the L layers, multi-token prediction included: per head, S positions and
    2 FLOPs for each of the d_qk dimensions of the scores and the d_v of the values, times 3 for forward and
    backward, halved because attention is causal, and less where a window cuts it. Document boundaries are not taken
    off. Recomputation and dropped tokens change nothing: these are the FLOPs of the model, not of the machine.
    """
    costs = layer_costs(config, sequence_length)
    # The backward pass costs twice the forward pass.
    return 3 * (sum(costs.layers) + costs.after)


class LayerCosts(NamedTuple):
    """Forward FLOPs of one token."""

    layers: list[float]
    before: float  # the embedding: a lookup, but its weight is stepped and reduced like a layer's; the cheapest layer's
    after: float  # head, and multi-token prediction with its own use of the head


def layer_costs(config: ModelConfig, sequence_length: int) -> LayerCosts:
    """What each layer, and what stands before and behind them, costs in the forward pass."""
    model = MoETransformer(config, select("cpu").ops, device="meta")
    shape = config.attention
    if shape.kind == "mla":
        head_dims = shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim
    else:
        head_dims = 2 * shape.head_dim

    def forward(number: int, layer: nn.Module) -> float:
        matrices = ((name, p) for name, p in layer.named_parameters(prefix=".") if not name.endswith("bias"))
        weights = sum(_used(name, p, config) for name, p in matrices if p.dim() > 1)
        window = min(config.window_of(number) or sequence_length, sequence_length)
        seen = 2 * window - window**2 / sequence_length  # twice the mean over positions
        return 2.0 * weights + seen * shape.num_heads * head_dims

    head = 2.0 * config.vocab_size * config.hidden_size
    layers = [forward(int(number), layer) for number, layer in model.layers.items()]
    further = sum(forward(config.num_layers + int(k), layer) + head for k, layer in model.mtp.items())
    return LayerCosts(layers, min(layers), head + further)


def _used(name: str, parameter: Tensor, config: ModelConfig) -> int:
    """Elements that one token is multiplied with; the first dimension of stacked experts counts them."""
    if ".experts." in name:
        return parameter.numel() // parameter.shape[0] * config.moe.top_k
    return parameter.numel()


def _part(name: str) -> str:
    segments = name.split(".")
    if segments[0] == "mtp":
        return _PARTS["mtp"]
    if segments[-2].endswith("norm"):  # those inside attention, too
        return _PARTS["norm"]
    return next(_PARTS[segment] for segment in segments if segment in _PARTS)
