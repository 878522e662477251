"""Grouped-query attention and multi-head latent attention.

Shapes: B batch, S sequence, L the sequence and what a cache has kept of the tokens before it, H hidden, N query heads,
M key/value heads, D head dimension, R rotated dimensions, W value head, C compressed keys and values, E = C + R.
"""

from typing import Any

import torch
from torch import Tensor, nn

from backends.operations import Operations
from trainer.model.config import ModelConfig
from trainer.model.context import Context
from trainer.model.linear import Linear, RMSNorm
from trainer.model.rope import softmax_scale


class GroupedQueryAttention(nn.Module):
    """Queries in N heads, keys and values in M (GQA, arXiv 2305.13245), with what families add.

    That is biases, QK-norm, a sliding window and sinks (gpt-oss: a learned logit per head in the softmax).
    """

    def __init__(self, config: ModelConfig, ops: Operations, window: int, **factory: Any) -> None:
        super().__init__()
        shape = config.attention
        self.ops, self.head_dim, self.interleaved = ops, shape.head_dim, config.rope.interleaved
        self.scale, self.window = softmax_scale(shape.head_dim, config.rope.yarn), window
        width = shape.num_heads * shape.head_dim
        kv_width = shape.num_kv_heads * shape.head_dim
        self.q = Linear(config.hidden_size, width, ops, bias=shape.bias, **factory)
        self.k = Linear(config.hidden_size, kv_width, ops, bias=shape.bias, **factory)
        self.v = Linear(config.hidden_size, kv_width, ops, bias=shape.bias, **factory)
        self.out = Linear(width, config.hidden_size, ops, bias=shape.output_bias, **factory)
        self.sinks = nn.Parameter(torch.empty(shape.num_heads, **factory)) if shape.sinks else None
        if shape.qk_norm:
            self.q_norm: nn.Module = RMSNorm(shape.head_dim, config.norm_eps, ops, **factory)
            self.k_norm: nn.Module = RMSNorm(shape.head_dim, config.norm_eps, ops, **factory)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x_BSH: Tensor, context: Context) -> Tensor:
        heads = (*x_BSH.shape[:2], -1, self.head_dim)
        q_BSND = self.q_norm(self.q(x_BSH).view(heads))
        k_BLMD = self.k_norm(self.k(x_BSH).view(heads))
        q_BSND = self.ops.rotary(q_BSND, context.cos_BSR, context.sin_BSR, self.interleaved)
        k_BLMD = self.ops.rotary(k_BLMD, context.cos_BSR, context.sin_BSR, self.interleaved)
        v_BLMD = self.v(x_BSH).view(heads)
        if context.cache is not None:
            k_BLMD, v_BLMD = context.cache.extended(self, k_BLMD, v_BLMD, window=self.window)
        y_BSND = self.ops.attention(q_BSND, k_BLMD, v_BLMD, self.scale, context.documents_BS, self.window, self.sinks)
        return self.out(y_BSND.flatten(2))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1, equations 9 to 19).

    Keys and values are expanded from a compressed vector per token; position lives in R extra dimensions of each
    query head and in one key shared by all heads.
    """

    def __init__(self, config: ModelConfig, ops: Operations, **factory: Any) -> None:
        super().__init__()
        shape = config.attention
        self.ops, self.shape, self.interleaved = ops, shape, config.rope.interleaved
        qk_dim = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        self.scale = softmax_scale(qk_dim, config.rope.yarn)
        hidden, heads = config.hidden_size, shape.num_heads
        if shape.q_lora_rank:
            self.q_down = Linear(hidden, shape.q_lora_rank, ops, **factory)
            self.q_norm = RMSNorm(shape.q_lora_rank, config.norm_eps, ops, **factory)
        self.q_up = Linear(shape.q_lora_rank or hidden, heads * qk_dim, ops, **factory)
        self.kv_down = Linear(hidden, shape.kv_lora_rank + shape.qk_rope_head_dim, ops, **factory)
        self.kv_norm = RMSNorm(shape.kv_lora_rank, config.norm_eps, ops, **factory)
        self.kv_up = Linear(shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.v_head_dim), ops, **factory)
        self.out = Linear(heads * shape.v_head_dim, hidden, ops, **factory)

    def forward(self, x_BSH: Tensor, context: Context) -> Tensor:
        shape = self.shape
        heads = (*x_BSH.shape[:2], shape.num_heads, -1)
        queries = self.q_norm(self.q_down(x_BSH)) if shape.q_lora_rank else x_BSH
        q_nope, q_rope = self.q_up(queries).view(heads).split([shape.qk_nope_head_dim, shape.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_down(x_BSH).split([shape.kv_lora_rank, shape.qk_rope_head_dim], -1)
        latent = self.kv_norm(latent)
        q_rope = self.ops.rotary(q_rope, context.cos_BSR, context.sin_BSR, self.interleaved)
        k_rope = self.ops.rotary(k_rope.unsqueeze(2), context.cos_BSR, context.sin_BSR, self.interleaved)
        cache = context.cache
        if cache is not None:
            (compressed_BL1E,) = cache.extended(self, torch.cat([latent.unsqueeze(2), k_rope], -1))
        if cache is not None and cache.seen:
            y_BSNW = self._over_compressed(q_nope, q_rope, compressed_BL1E)
        else:  # without tokens before these, the keys and values of all heads cost less
            k_nope, v_BSNW = self.kv_up(latent).view(heads).split([shape.qk_nope_head_dim, shape.v_head_dim], -1)
            q_BSND = torch.cat([q_nope, q_rope], -1)
            k_BSND = torch.cat([k_nope, k_rope.expand(*heads[:3], -1)], -1)
            y_BSNW = self.ops.attention(q_BSND, k_BSND, v_BSNW, self.scale, context.documents_BS)
        return self.out(y_BSNW.flatten(2))

    def _over_compressed(self, q_nope: Tensor, q_rope: Tensor, compressed_BL1E: Tensor) -> Tensor:
        """The same attention without making the keys and values of earlier tokens again -> (B, S, N, W).

        A score is q · (K c) = (Kᵀ q) · c, and an output V applied to the weighted sum of the compressed vectors c. So
        all heads share one key, (c, rotary key), and one value, c (the paper's section 2.1.2).
        """
        shape = self.shape
        up_NDC = self.kv_up.weight.view(shape.num_heads, -1, shape.kv_lora_rank)
        k_NDC, v_NWC = up_NDC.split([shape.qk_nope_head_dim, shape.v_head_dim], 1)
        q_BSNE = torch.cat([self._per_head(q_nope, k_NDC.transpose(1, 2)), q_rope], -1)
        values_BL1C = compressed_BL1E[..., : shape.kv_lora_rank]
        y_BSNC = self.ops.attention(q_BSNE, compressed_BL1E, values_BL1C, self.scale)
        return self._per_head(y_BSNC, v_NWC)

    def _per_head(self, x_BSNI: Tensor, weight_NOI: Tensor) -> Tensor:
        """Each head times its own matrix -> (B, S, N, O)."""
        B, S, N, _ = x_BSNI.shape
        rows = x_BSNI.permute(2, 0, 1, 3).flatten(0, 2)
        counts_N = torch.full((N,), B * S, device=rows.device)
        return self.ops.grouped_mm(rows, weight_NOI, counts_N).view(N, B, S, -1).permute(1, 2, 0, 3)


def build_attention(config: ModelConfig, number: int, ops: Operations, **factory: Any) -> nn.Module:
    """The attention of layer ``number``, of the kind that ``config.attention.kind`` names."""
    if config.attention.kind == "mla":
        return LatentAttention(config, ops, **factory)
    return GroupedQueryAttention(config, ops, config.window_of(number), **factory)
