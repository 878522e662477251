"""Initial weights by name, and shapes that no machine holds."""

import time

import psutil
import pytest
import torch
from models_for_tests import OPS, config, gqa, mla, moe, published

from trainer.model import ModelConfig, MoETransformer, materialize
from trainer.model.moe import Experts, MoE

SHAPE = config(attention=gqa(bias=True), mtp_layers=1, init_std=0.01)


def initial(shape: ModelConfig = SHAPE, seed: int = 0, dtype=torch.float32, first=0, count=None) -> MoETransformer:
    model = MoETransformer(shape, OPS, device="meta", dtype=dtype)
    if count is not None:
        for module in model.modules():
            if isinstance(module, MoE):
                module.experts.shard(first, count)
    materialize(model, seed, "cpu")
    return model


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_expert_shards_hold_the_same_values(shards):
    whole = initial().state_dict()
    count = SHAPE.moe.num_experts // shards
    for first in range(0, SHAPE.moe.num_experts, count):
        part = initial(first=first, count=count).state_dict()
        assert part.keys() == whole.keys()
        for name, value in part.items():
            expected = whole[name][first : first + count] if ".experts." in name else whole[name]
            assert torch.equal(value, expected), name


def test_shards_are_made_on_the_meta_device_once():
    experts = Experts(moe(num_experts=4, expert_hidden_size=2), 3, OPS, device="meta")
    experts.shard(2, 2)
    assert (experts.first, experts.total, experts.gate_up.shape) == (2, 4, (2, 4, 3))
    with pytest.raises(AssertionError, match="sharded once"):
        experts.shard(0, 1)
    with pytest.raises(AssertionError, match="meta"):
        Experts(moe(num_experts=4), 3, OPS).shard(0, 2)


def test_fewer_layers_of_a_model_get_the_values_of_their_names():
    """A pipeline stage holds only some layers and neither the embedding nor the head."""
    whole = initial().state_dict()
    stage = MoETransformer(SHAPE, OPS, device="meta")
    for number in ("0", "2"):
        del stage.layers[number]
    del stage.mtp["0"]
    materialize(stage, 0, "cpu")
    assert "layers.1.attention.q.weight" in stage.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in stage.state_dict().items())


def test_neither_global_generator_nor_default_device_nor_dtype_matter():
    whole = initial().state_dict()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = initial().state_dict()
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    narrow = initial(dtype=torch.bfloat16).state_dict()
    for name, value in whole.items():
        expected = value if name.endswith("expert_bias") else value.bfloat16()
        assert torch.equal(narrow[name], expected), name


def test_seeds_and_names_differ():
    one, two = initial(seed=0).state_dict(), initial(seed=1).state_dict()
    drawn = [name for name in one if not name.endswith(("norm.weight", "bias"))]
    assert not any(torch.equal(one[name], two[name]) for name in drawn)
    # First values, of each expert for stacked ones: no two tensors come from one generator state.
    firsts = [e.flatten()[:4] for name in drawn for e in (one[name] if ".experts." in name else [one[name]])]
    assert len({tuple(values.tolist()) for values in firsts}) == len(firsts) > 60


@pytest.mark.parametrize("attention", [gqa(bias=True), mla()], ids=["gqa", "mla"])
def test_spread_ones_and_zeros(attention):
    shape = config(
        vocab_size=300,
        hidden_size=64,
        attention=attention,
        moe=moe(expert_hidden_size=48),
        mtp_layers=1,
        init_std=0.013,
    )
    ones, zeros, drawn = 0, 0, 0
    for name, value in initial(shape).state_dict().items():
        if name.endswith("norm.weight"):
            assert (value == 1).all(), name
            ones += 1
        elif name.endswith("bias"):
            assert (value == 0).all(), name
            zeros += 1
        else:
            # The standard error of a standard deviation is std / sqrt(2 n), that of a mean std / sqrt(n).
            slack = 5 / value.numel() ** 0.5
            assert abs(value.std() / 0.013 - 1) < slack, name
            assert abs(value.mean() / 0.013) < slack, name
            assert value.abs().max() < 6 * 0.013
            drawn += 1
    # Four layers: two norms each, two within attention; the last norm, and three of MTP.
    assert ones == 4 * 4 + 1 + 3
    assert zeros == 3 + (4 * 3 if attention.bias else 0)
    assert drawn > 20


def test_tied_weights_stay_tied():
    model = initial(config(tie_embeddings=True))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, initial(config()).embed.weight)


def test_a_trillion_parameters_on_meta():
    """Kimi-K2's shape: seconds, and no memory to speak of."""
    shape = published("kimi-k2")
    shape.validate("kimi")
    process = psutil.Process()
    before, start = process.memory_info().rss, time.process_time()
    model = MoETransformer(shape, OPS, device="meta", dtype=torch.bfloat16)
    assert time.process_time() - start < 10
    assert process.memory_info().rss - before < 50 * 2**20
    assert sum(value.numel() for value in model.parameters()) > 10**12
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])
