"""How evenly tokens spread over the experts of each MoE layer."""

import math
from collections.abc import Mapping

from torch import Tensor


def expert_load(counts: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Two figures a layer, from the tokens that chose each expert.

    Args:
        counts: layer name to tokens per expert (E,), of the global batch.

    Returns:
        layer name to ``max_over_mean`` (1 when even, E when one expert takes all) and ``entropy`` of the shares
        divided by log E (1 when even, 0 when one expert takes all). NaN where no token was counted.
    """
    load = {}
    for layer, counts_E in counts.items():
        tokens_E = counts_E.detach().double().cpu()
        share_E = tokens_E / tokens_E.sum()
        experts = len(tokens_E)
        entropy = -share_E.xlogy(share_E).sum().item() / math.log(experts) if experts > 1 else 1.0
        load[layer] = {"max_over_mean": (share_E.max() * experts).item(), "entropy": entropy}
    return load
