"""Parameters and FLOPs against numbers worked out by hand and published ones."""

import time

import pytest
from models_for_tests import published

from backends import select
from trainer.model import ModelConfig, MoETransformer
from trainer.model.config import AttentionConfig, MoEConfig
from trainer.model.count import Count, count_parameters, flops_per_token


def build(config: ModelConfig) -> MoETransformer:
    return MoETransformer(config, select("cpu").ops, device="meta")


def small(**more) -> ModelConfig:
    return ModelConfig(
        vocab_size=100,
        hidden_size=8,
        num_layers=3,
        dense_layers=1,
        dense_hidden_size=20,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, bias=True),
        moe=MoEConfig(num_experts=5, top_k=2, expert_hidden_size=7, num_shared_experts=3, expert_bias=True),
        **more,
    )


ATTENTION = 8 * 24 + 2 * 8 * 12 + 24 * 8  # q, k and v, out
BIASES = 24 + 2 * 12
EXPERT = 3 * 8 * 7


def test_parts_of_a_small_model():
    assert count_parameters(build(small())) == {
        "embedding": Count(800, 8),
        "attention": Count(3 * (ATTENTION + BIASES), 3 * (ATTENTION + BIASES)),
        "dense feed-forward": Count(3 * 8 * 20, 3 * 8 * 20),
        "routed experts": Count(2 * 5 * EXPERT, 2 * 2 * EXPERT),
        "shared experts": Count(2 * 3 * EXPERT, 2 * 3 * EXPERT),
        "router": Count(2 * 40, 2 * 40),
        "norms": Count(3 * (2 * 8 + 2 * 6) + 8, 3 * (2 * 8 + 2 * 6) + 8),
        "head": Count(800, 800),
    }


def test_multi_token_prediction_is_a_part_with_all_that_is_in_it():
    counts = count_parameters(build(small(mtp_layers=2)))
    fixed = 2 * 8 * 8 + ATTENTION + BIASES + 3 * EXPERT + 40 + (2 * 8 + 2 * 6) + 3 * 8
    assert counts["multi-token prediction"] == Count(2 * (fixed + 5 * EXPERT), 2 * (fixed + 2 * EXPERT))
    assert {part: count for part, count in counts.items() if part != "multi-token prediction"} == count_parameters(
        build(small())
    )


def test_a_tied_head_is_counted_once():
    counts = count_parameters(build(small(tie_embeddings=True)))
    assert counts["embedding"] == Count(800, 800) and "head" not in counts


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_every_parameter_belongs_to_one_part(kind):
    config = small(mtp_layers=1)
    config.attention.kind, config.attention.q_lora_rank = kind, 12
    model = build(config)
    counts = count_parameters(model)
    assert sum(count.total for count in counts.values()) == sum(p.numel() for p in model.parameters())


def test_flops_of_a_small_model():
    weights = 3 * ATTENTION + 3 * 8 * 20 + 2 * (2 + 3) * EXPERT + 2 * 40 + 800
    assert flops_per_token(small(), 32) == 6 * weights + 3 * 3 * 32 * 4 * (6 + 6)
    # Multi-token prediction adds its projection, a layer, and the head once more.
    further = 2 * 8 * 8 + ATTENTION + (2 + 3) * EXPERT + 40 + 800
    assert flops_per_token(small(mtp_layers=1), 32) == 6 * (weights + further) + 3 * 4 * 32 * 4 * (6 + 6)
    assert flops_per_token(small(tie_embeddings=True), 32) == flops_per_token(small(), 32)


def test_deepseek_v3_has_its_published_size_in_seconds():
    """671 B in total, 37 B active per token (arXiv 2412.19437, abstract)."""
    began = time.perf_counter()
    counts = count_parameters(build(published("deepseek-v3", "model.mtp_layers=0")))
    assert time.perf_counter() - began < 10
    assert sum(count.total for count in counts.values()) == 671_026_404_352
    assert sum(count.active for count in counts.values()) / 1e9 == pytest.approx(36.6, abs=0.1)


def test_mla_attention_flops():
    config = published("deepseek-v3", "model.mtp_layers=0")
    assert flops_per_token(config, 4097) - flops_per_token(config, 4096) == 3 * 61 * 128 * (192 + 128)
