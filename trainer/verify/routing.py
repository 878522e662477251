"""How clear a router's choice was.

Shapes: T tokens, E experts, G groups, K choices per token.
"""

import math

import torch
from torch import Tensor

from trainer.model.router import Router


def margins(router: Router, scores_TE: Tensor) -> Tensor:
    """By how much the last chosen expert leads the first that was not, or the last open group the first closed (T,).

    A choice whose margin is within rounding may fall either way. Infinite where there was nothing to choose.
    """
    config = router.config
    if router.expert_bias is not None:
        scores_TE = scores_TE + router.expert_bias
    margin_T = torch.full(scores_TE.shape[:1], math.inf, device=scores_TE.device)
    if config.num_groups > 1:
        scores_TGe = scores_TE.unflatten(-1, (config.num_groups, -1))
        worth_TG = scores_TGe.topk(min(2, scores_TGe.shape[-1]), -1).values.sum(-1)
        margin_T = torch.minimum(margin_T, _lead(worth_TG, config.top_groups))
        chosen = worth_TG.topk(config.top_groups, -1).indices
        closed_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter(-1, chosen, False)
        scores_TE = scores_TGe.masked_fill(closed_TG.unsqueeze(-1), -math.inf).flatten(-2)
    return torch.minimum(margin_T, _lead(scores_TE, config.top_k))


def _lead(values_TN: Tensor, count: int) -> Tensor:
    """The ``count``-th largest less the next (T,)."""
    if count == values_TN.shape[-1]:
        return values_TN.new_full(values_TN.shape[:1], math.inf)
    best = values_TN.topk(count + 1, -1).values
    return best[:, -2] - best[:, -1]
