"""Rotary frequencies and YaRN against transformers and against the formula in Python floats."""

import math

import pytest
import torch
from models_for_tests import distance, mla
from transformers import DeepseekV3Config, Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale
from transformers_oracle import their_rope

from trainer.model import ModelConfig
from trainer.model.config import AttentionConfig, RopeConfig, YarnConfig
from trainer.model.rope import amplitude, inverse_frequencies, rotated_dims, rotations, softmax_scale

# A power and a division in fp32, theirs in the other order: four roundings of 6e-8.
FP32 = 2.5e-7

YARNS = {
    "deepseek-v3": (1e4, 64, YarnConfig(40, 4096, 32, 1, 1.0, 1.0)),
    "kimi-k2": (5e4, 64, YarnConfig(32, 4096, 1, 1, 1.0, 1.0)),
    "gpt-oss": (1.5e5, 64, YarnConfig(32, 4096, 32, 1, truncate=False)),
    "qwen3": (1e6, 128, YarnConfig(4, 32768)),
    "uneven-scales": (1e4, 64, YarnConfig(16, 2048, 24, 2, 0.707, 1.3)),
    "range-cut-below": (1e4, 16, YarnConfig(8, 64)),
    "range-cut-above": (10.0, 16, YarnConfig(8, 512)),
    "one-pair": (1e4, 2, YarnConfig(8, 128)),
}


@pytest.mark.parametrize("name", YARNS)
def test_yarn(name):
    theta, dims, yarn = YARNS[name]
    rope = RopeConfig(theta=theta, yarn=yarn)
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](
        Qwen3MoeConfig(head_dim=dims, rope_parameters=their_rope(ModelConfig(rope=rope)))
    )
    ours = inverse_frequencies(rope, dims)
    assert ours.dtype == torch.float32
    assert ((ours - theirs).abs() / theirs).max() < FP32
    assert abs(amplitude(yarn) - factor) < 1e-15


@pytest.mark.parametrize("name", YARNS)
def test_yarn_scales_the_softmax_as_deepseek_does(name):
    theta, _, yarn = YARNS[name]
    expected = yarn_apply_mscale(their_rope(ModelConfig(rope=RopeConfig(theta=theta, yarn=yarn))), 192**-0.5)
    assert abs(softmax_scale(192, yarn) - expected) < 1e-16


def test_mscale_alone_scales_the_tables():
    """transformers ignores ``mscale`` without ``mscale_all_dim``; DeepSeek's own code, followed here, does not."""
    assert amplitude(YarnConfig(40, mscale=0.5)) == 0.05 * math.log(40) + 1
    assert softmax_scale(64, YarnConfig(40, mscale=0.5)) == 1 / 8


@pytest.mark.parametrize(("theta", "dims"), [(1e4, 64), (1e6, 128), (6e5, 6), (5e4, 2)])
def test_plain_frequencies(theta, dims):
    ours = inverse_frequencies(RopeConfig(theta=theta), dims)
    exact = torch.tensor([theta ** (-2 * i / dims) for i in range(dims // 2)], dtype=torch.float64)
    # Rounding an exponent by 2^-25 moves the power by ln(theta) as much.
    assert ((ours - exact).abs() / exact).max() < FP32 + math.log(theta) * 2**-25
    theirs, _ = DeepseekV3RotaryEmbedding.compute_default_rope_parameters(
        DeepseekV3Config(qk_rope_head_dim=dims, rope_parameters={"rope_type": "default", "rope_theta": theta})
    )
    assert ((ours - theirs).abs() / theirs).max() < FP32


def test_yarn_keeps_every_frequency_when_all_pairs_are_fast():
    """All rotate more than 32 times within the original context; transformers' ramp turns round here and slows them."""
    rope = RopeConfig(theta=10.0, yarn=YarnConfig(8, 2**20))
    assert torch.equal(inverse_frequencies(rope, 16), inverse_frequencies(RopeConfig(theta=10.0), 16))


def test_yarn_of_factor_one_is_off():
    rope = RopeConfig(yarn=YarnConfig(factor=1.0, original_max_position=8, mscale=0.3, mscale_all_dim=0.9))
    assert torch.equal(inverse_frequencies(rope, 32), inverse_frequencies(RopeConfig(), 32))
    assert amplitude(rope.yarn) == 1
    assert softmax_scale(16, rope.yarn) == 0.25


def test_rotations_are_the_cosine_and_sine_of_position_times_frequency():
    yarn = YarnConfig(4, 64)
    rope = RopeConfig(yarn=yarn)
    positions = torch.tensor([[0, 1, 2, 0, 1, 7], [5, 4, 3, 2, 1, 0]])
    cos, sin = rotations(rope, 16, positions)
    assert cos.shape == sin.shape == (2, 6, 8)
    assert cos.dtype == sin.dtype == torch.float32
    factor = 0.1 * math.log(4) + 1
    angles = positions[..., None].double() * inverse_frequencies(rope, 16).double()
    # Angles up to 7 carry half a unit in the last place, 2.4e-7, and so do their cosines.
    assert (cos - factor * angles.cos()).abs().max() < 5e-7
    assert (sin - factor * angles.sin()).abs().max() < 5e-7
    assert torch.equal(cos[0, 0], torch.full((8,), factor))
    assert torch.equal(sin[0, 0], torch.zeros(8))


def test_far_positions_keep_fp32_angles():
    """At 131072 an fp32 angle is right to 2^-8 only, as in every published model; bf16 positions would be far off."""
    cos, _ = rotations(RopeConfig(theta=1e6), 128, torch.tensor([[131071]]))
    exact = torch.tensor([math.cos(131071 * 1e6 ** (-2 * i / 128)) for i in range(64)], dtype=torch.float64)
    assert (cos[0, 0] - exact).abs().max() < 2 * 131072 * 2**-23
    assert distance(cos[0, 0, 32:], exact[32:]) < 1e-4


def test_rotated_dims():
    assert rotated_dims(AttentionConfig(head_dim=128), RopeConfig(fraction=0.5)) == 64
    assert rotated_dims(AttentionConfig(head_dim=128), RopeConfig()) == 128
    assert rotated_dims(mla(qk_rope_head_dim=4), RopeConfig(fraction=0.5)) == 4
