"""Rotary position embedding with partial rotation and YaRN.

Sources: RoFormer (arXiv 2104.09864) section 3.2.2; YaRN (arXiv 2309.00071) sections 3.2 to 3.4; the attention
temperature as DeepSeek-V3's public configuration writes it (``mscale``, ``mscale_all_dim``).

Shapes: B batch, S sequence, R rotated dimensions of a head.
"""

import math

import torch
from torch import Tensor

from trainer.model.config import AttentionConfig, RopeConfig, YarnConfig


def rotated_dims(attention: AttentionConfig, rope: RopeConfig) -> int:
    """R: how many dimensions of a head carry position."""
    if attention.kind == "mla":
        return attention.qk_rope_head_dim
    return int(attention.head_dim * rope.fraction)


def inverse_frequencies(rope: RopeConfig, dims: int, device: torch.device | str | None = None) -> Tensor:
    """Angular frequency of each rotated pair, (R/2,), fp32, YaRN applied when its factor is above 1."""
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
    plain = rope.theta**-exponents
    if rope.yarn.factor <= 1:
        return plain
    low, high = _correction_range(rope, dims)
    ramp = ((torch.arange(dims // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    # Fast pairs keep their frequency, slow pairs are interpolated, the ramp blends between.
    return plain * (1 - ramp) + plain / rope.yarn.factor * ramp


def _correction_range(rope: RopeConfig, dims: int) -> tuple[float, float]:
    """First and last pair between which YaRN blends (equations 17 and 18 solved for the dimension)."""
    yarn = rope.yarn

    def pair_with(rotations: float) -> float:
        return dims * math.log(yarn.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    return low, high if high > low else low + 0.001


def _temperature(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def amplitude(yarn: YarnConfig) -> float:
    """Factor on cosine and sine: YaRN's attention temperature, split as DeepSeek-V3 does."""
    return _temperature(yarn.factor, yarn.mscale) / _temperature(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(head_dim: int, yarn: YarnConfig) -> float:
    """1/sqrt(head_dim), times the squared temperature where ``mscale_all_dim`` moves it out of the rotation."""
    return head_dim**-0.5 * _temperature(yarn.factor, yarn.mscale_all_dim) ** 2


def rotations(rope: RopeConfig, dims: int, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and pair: two fp32 tensors (B, S, R/2)."""
    angles = positions_BS[..., None].float() * inverse_frequencies(rope, dims, positions_BS.device)
    factor = amplitude(rope.yarn)
    return angles.cos() * factor, angles.sin() * factor
