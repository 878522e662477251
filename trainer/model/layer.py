"""One transformer layer, and the multi-token-prediction layer built around one.

Shapes: B batch, S sequence, H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from backends.operations import Operations
from trainer.model.attention import build_attention
from trainer.model.config import ModelConfig
from trainer.model.context import Context
from trainer.model.linear import Linear, RMSNorm, SwiGLU, at_least_fp32
from trainer.model.moe import MoE


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward; the feed-forward is dense or a Mixture of Experts by layer number."""

    def __init__(self, config: ModelConfig, number: int, ops: Operations, **factory: Any) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, ops, **factory)
        self.attention = build_attention(config, number, ops, **factory)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps, ops, **factory)
        if config.is_moe(number):
            self.moe: MoE | None = MoE(config, ops, str(number), **factory)
        else:
            self.moe = None
            self.mlp = SwiGLU(config.hidden_size, config.dense_hidden_size, ops, **factory)

    def forward(self, x_BSH: Tensor, context: Context) -> Tensor:
        # The residual may be fp32 under bf16 weights; the branches come back in the weights' dtype.
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), context)
        normed = self.ffn_norm(x_BSH)
        return x_BSH + (self.mlp(normed) if self.moe is None else self.moe(normed, context))


class MultiTokenPrediction(nn.Module):
    """Predicts one token further ahead (DeepSeek-V3, arXiv 2412.19437, section 2.2, equations 21 to 23).

    The embedding half comes first in the projection and the incoming hidden states are the normalised ones, as in
    the published DeepSeek-V3 weights.
    """

    def __init__(self, config: ModelConfig, number: int, ops: Operations, **factory: Any) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.residual_fp32 = config.residual_fp32
        self.embed_norm = RMSNorm(size, eps, ops, **factory)
        self.hidden_norm = RMSNorm(size, eps, ops, **factory)
        self.project = Linear(2 * size, size, ops, **factory)
        self.layer = TransformerLayer(config, number, ops, **factory)
        self.norm = RMSNorm(size, eps, ops, **factory)

    def forward(self, hidden_BSH: Tensor, embedded_BSH: Tensor, context: Context) -> Tensor:
        both = torch.cat([self.embed_norm(embedded_BSH), self.hidden_norm(hidden_BSH)], -1)
        x_BSH = self.project(both)
        if self.residual_fp32:
            x_BSH = at_least_fp32(x_BSH)
        return self.norm(self.layer(x_BSH, context))
