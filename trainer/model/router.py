"""Which experts a token is sent to, with what weight, and the losses that keep the load even.

Sources: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2: sigmoid scores and equations 12 to 16, expert bias, group
limits, sequence-wise balance loss (equations 17 to 20); arXiv 2408.15664 for the bias update; ST-MoE
(arXiv 2202.08906) equation 5 for the z-loss.

Shapes: B batch, S sequence, T = B*S tokens, H hidden, E experts, K chosen experts, G groups.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.model.config import MoEConfig
from trainer.model.context import Context
from trainer.model.linear import at_least_fp32


class Routing(NamedTuple):
    """The router's decision for every token."""

    experts_TK: Tensor  # int64; num_experts stands for a dropped choice
    weights_TK: Tensor  # fp32; 0 where dropped
    tokens_E: Tensor  # int64: tokens that chose each expert, before any were dropped
    losses: dict[str, Tensor]  # scalars, weighted and divided by their global share


class Router(nn.Module):
    """Scores in fp32 whatever the model's precision."""

    expert_bias: Tensor | None

    def __init__(self, config: MoEConfig, hidden_size: int, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size, **factory))
        bias = torch.empty(config.num_experts, device=factory.get("device")) if config.expert_bias else None
        self.bias = nn.Parameter(torch.empty(config.num_experts, **factory)) if config.router_bias else None
        self.register_buffer("expert_bias", bias)  # fp32 always: the update is far below bf16's resolution

    def forward(self, x_BSH: Tensor, context: Context) -> Routing:
        """Choose K experts per token.

        Args:
            x_BSH: normalised hidden states (B, S, H).
            context: gives the global token and sequence counts that losses are divided by.
        """
        config = self.config
        logits_BSE = torch.matmul(at_least_fp32(x_BSH), at_least_fp32(self.weight).t())
        if self.bias is not None:
            logits_BSE = logits_BSE + self.bias
        scores_BSE = logits_BSE.sigmoid() if config.score == "sigmoid" else logits_BSE.softmax(-1)
        experts_BSK = self._select(scores_BSE.detach())
        weights_BSK = scores_BSE.gather(-1, experts_BSK)
        if config.normalize and config.top_k > 1:
            weights_BSK = weights_BSK / (weights_BSK.sum(-1, keepdim=True) + 1e-20)
        weights_BSK = weights_BSK * config.scale
        tokens_BE = _tokens_per_expert(experts_BSK, config.num_experts)
        losses = self._losses(logits_BSE, scores_BSE, tokens_BE, context)
        # Whom to drop is decided on whole sequences. Text that grows has none yet: nothing is dropped.
        if config.capacity_factor is not None and context.cache is None:
            dropped_BSK = self._over_capacity(weights_BSK.detach(), experts_BSK)
            experts_BSK = experts_BSK.masked_fill(dropped_BSK, config.num_experts)
            weights_BSK = weights_BSK.masked_fill(dropped_BSK, 0.0)
        return Routing(experts_BSK.flatten(0, 1), weights_BSK.flatten(0, 1), tokens_BE.sum(0), losses)

    def _select(self, scores_BSE: Tensor) -> Tensor:
        """Indices of the K best experts; the bias counts here and nowhere else."""
        config = self.config
        if self.expert_bias is not None:
            scores_BSE = scores_BSE + self.expert_bias
        if config.num_groups > 1:
            scores_BSGe = scores_BSE.unflatten(-1, (config.num_groups, -1))
            # A group is worth its two best experts (DeepSeek-V3's reference inference code).
            worth_BSG = scores_BSGe.topk(min(2, scores_BSGe.shape[-1]), -1).values.sum(-1)
            chosen = worth_BSG.topk(config.top_groups, -1, sorted=False).indices
            closed_BSG = torch.ones_like(worth_BSG, dtype=torch.bool).scatter(-1, chosen, False)
            scores_BSE = scores_BSGe.masked_fill(closed_BSG.unsqueeze(-1), -math.inf).flatten(-2)
        return scores_BSE.topk(config.top_k, -1, sorted=False).indices

    def _losses(self, logits_BSE: Tensor, scores_BSE: Tensor, tokens_BE: Tensor, context: Context) -> dict[str, Tensor]:
        config, sequence = self.config, logits_BSE.shape[1]
        losses = {}
        if config.aux_loss > 0:
            load_BE = tokens_BE.to(scores_BSE.dtype) * (config.num_experts / (config.top_k * sequence))
            share_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)
            losses["aux_loss"] = config.aux_loss * (load_BE * share_BE).sum() / context.share.sequences
        if config.z_loss > 0:
            z = logits_BSE.logsumexp(-1).square().mean(1).sum()
            losses["z_loss"] = config.z_loss * z / context.share.sequences
        return losses

    def _over_capacity(self, weights_BSK: Tensor, experts_BSK: Tensor) -> Tensor:
        """True for choices that their expert has no room for: in each sequence it keeps the largest weights.

        Room is counted per sequence, so that what is dropped depends neither on the micro-batch nor on the layout.
        """
        config, sequence = self.config, experts_BSK.shape[1]
        assert config.capacity_factor is not None
        room = math.ceil(sequence * config.top_k / config.num_experts * config.capacity_factor)
        if room >= sequence:
            return torch.zeros_like(experts_BSK, dtype=torch.bool)
        shape = (*experts_BSK.shape[:2], config.num_experts)
        wanted_BSE = weights_BSK.new_full(shape, -1.0).scatter(-1, experts_BSK, weights_BSK)
        kept = wanted_BSE.topk(room, 1, sorted=False).indices
        full_BSE = torch.ones_like(wanted_BSE, dtype=torch.bool).scatter(1, kept, False)
        return full_BSE.gather(-1, experts_BSK)

    @torch.no_grad()
    def balance(self, tokens_E: Tensor) -> None:
        """Move the bias of busy experts down and of idle ones up by the configured rate.

        Called once per optimizer step with the tokens of the *global* batch (E,), as integers: every rank takes
        the same step.
        """
        if self.expert_bias is not None:
            load = tokens_E.double()
            self.expert_bias += self.config.expert_bias_rate * (load.mean() - load).sign().float()


def _tokens_per_expert(experts_BSK: Tensor, num_experts: int) -> Tensor:
    """(B, E) int64: how often each sequence chose each expert."""
    batch = experts_BSK.shape[0]
    # In one dimension, where a deterministic scatter exists on every device.
    first_B11 = torch.arange(0, batch * num_experts, num_experts, device=experts_BSK.device).view(-1, 1, 1)
    flat = (experts_BSK + first_B11).flatten()
    return experts_BSK.new_zeros(batch * num_experts).scatter_add(0, flat, torch.ones_like(flat)).view(batch, -1)
