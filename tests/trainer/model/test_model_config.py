"""Every shape that cannot work is refused with its file, its key, the value and a remedy."""

import pytest
import torch
from models_for_tests import build, config, gqa, mla, moe, some_tokens

from backends.errors import UserError
from trainer.model import ModelConfig
from trainer.model.config import AttentionConfig, MoEConfig, RopeConfig, YarnConfig

REFUSED = [
    ({"vocab_size": 0}, "vocab_size: is 0; it must be at least 1"),
    ({"hidden_size": 0}, "hidden_size: is 0; it must be at least 1"),
    ({"num_layers": 0}, "num_layers: is 0; it must be at least 1"),
    ({"dense_hidden_size": -3}, "dense_hidden_size: is -3; it must be at least 1"),
    ({"dense_layers": 4}, "dense_layers: is 4; it must lie between 0 and num_layers=3"),
    ({"dense_layers": -1}, "dense_layers: is -1; it must lie between 0 and num_layers=3"),
    ({"attention": gqa(num_heads=0)}, "attention.num_heads: is 0; it must be at least 1"),
    ({"attention": gqa(head_dim=0)}, "attention.head_dim: is 0; it must be at least 1"),
    ({"attention": gqa(num_kv_heads=3)}, "attention.num_kv_heads: 3 does not divide num_heads=4; choose a divisor"),
    ({"attention": gqa(num_kv_heads=0)}, "attention.num_kv_heads: 0 does not divide num_heads=4; choose a divisor"),
    ({"attention": mla(q_lora_rank=-1)}, "attention.q_lora_rank: is -1; it must be 0 or more"),
    ({"attention": mla(qk_nope_head_dim=-1)}, "attention.qk_nope_head_dim: is -1; it must be 0 or more"),
    ({"attention": mla(kv_lora_rank=0)}, "attention.kv_lora_rank: is 0; it must be at least 1"),
    ({"attention": mla(v_head_dim=0)}, "attention.v_head_dim: is 0; it must be at least 1"),
    ({"attention": mla(qk_rope_head_dim=0)}, "attention.qk_rope_head_dim: is 0; it must be at least 1"),
    (
        {"attention": mla(qk_rope_head_dim=3)},
        "attention.qk_rope_head_dim: rotates 3 dimensions of a head; the number must be even and above 0",
    ),
    ({"rope": RopeConfig(fraction=0.0)}, "rope.fraction: is 0; it must be above 0 and at most 1"),
    ({"rope": RopeConfig(fraction=1.5)}, "rope.fraction: is 1.5; it must be above 0 and at most 1"),
    (
        {"rope": RopeConfig(fraction=0.5)},
        "rope.fraction: rotates 3 dimensions of a head; the number must be even and above 0",
    ),
    (
        {"rope": RopeConfig(fraction=0.4)},
        "rope.fraction: rotates 2.4 dimensions of a head; the number must be even and above 0",
    ),
    (
        {"rope": RopeConfig(yarn=YarnConfig(original_max_position=0))},
        "rope.yarn.original_max_position: is 0; it must be at least 1",
    ),
    ({"moe": moe(scale=0.0)}, "moe.scale: is 0; it must be above 0"),
    ({"moe": moe(top_k=9)}, "moe.top_k: 9 is more than num_experts=8; set it between 1 and 8"),
    ({"moe": moe(top_k=0)}, "moe.top_k: is 0; set it between 1 and 8"),
    ({"moe": moe(num_groups=3)}, "moe.num_groups: 3 does not divide num_experts=8; choose a divisor"),
    ({"moe": moe(num_groups=0)}, "moe.num_groups: 0 does not divide num_experts=8; choose a divisor"),
    ({"moe": moe(num_groups=4, top_groups=5)}, "moe.top_groups: is 5; set it between 1 and num_groups=4"),
    ({"moe": moe(num_groups=4, top_groups=0)}, "moe.top_groups: is 0; set it between 1 and num_groups=4"),
    (
        {"moe": moe(num_groups=4, top_groups=1)},
        "moe.top_k: 3 experts do not fit in top_groups=1 groups; raise top_groups or lower top_k",
    ),
    (
        {"moe": moe(capacity_factor=0.0)},
        "moe.capacity_factor: is 0; set it above 0, or to null, which drops no token",
    ),
    ({"mtp_layers": -1}, "mtp_layers: is -1; it must be 0 or more"),
    ({"mtp_loss": -0.1}, "mtp_loss: is -0.1; it must be 0 or more"),
    ({"init_std": -1.0}, "init_std: is -1; it must be above 0"),
    ({"init_std": float("nan")}, "init_std: is nan; it must be a finite number"),
    ({"norm_eps": 0.0}, "norm_eps: is 0; it must be above 0"),
    ({"rope": RopeConfig(theta=0.0)}, "rope.theta: is 0; it must be above 0"),
    (
        {"rope": RopeConfig(yarn=YarnConfig(factor=0.5))},
        "rope.yarn.factor: is 0.5; it must be at least 1; 1 switches YaRN off",
    ),
    ({"moe": moe(num_experts=-1)}, "moe.num_experts: is -1; it must be 0 or more"),
    ({"moe": moe(expert_hidden_size=0)}, "moe.expert_hidden_size: is 0; it must be at least 1"),
    ({"moe": moe(num_shared_experts=-1)}, "moe.num_shared_experts: is -1; it must be 0 or more"),
    ({"moe": moe(aux_loss=-0.1)}, "moe.aux_loss: is -0.1; it must be 0 or more"),
    ({"moe": moe(z_loss=-0.1)}, "moe.z_loss: is -0.1; it must be 0 or more"),
    ({"moe": moe(expert_bias_rate=-0.1)}, "moe.expert_bias_rate: is -0.1; it must be 0 or more"),
    ({"moe": moe(capacity_factor=float("nan"))}, "moe.capacity_factor: is nan; it must be a finite number"),
    (
        {"rope": RopeConfig(yarn=YarnConfig(mscale=float("inf")))},
        "rope.yarn.mscale: is inf; it must be a finite number",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_refused(values, message):
    with pytest.raises(UserError) as raised:
        config(**values).validate("run.yaml")
    assert str(raised.value) == f"run.yaml: model.{message}"


SMALLEST = {
    "defaults": ModelConfig(),
    "one-of-everything": ModelConfig(
        vocab_size=1,
        hidden_size=1,
        num_layers=1,
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2),
        moe=MoEConfig(num_experts=1, top_k=1, expert_hidden_size=1),
        mtp_layers=1,
    ),
    "mla-without-nope": config(attention=mla(qk_nope_head_dim=0, q_lora_rank=0)),
    "no-experts-ignores-their-keys": config(moe=MoEConfig(num_experts=0, top_k=7, num_groups=5, expert_hidden_size=0)),
    "mla-ignores-gqa-keys": config(attention=mla(head_dim=7, num_kv_heads=2), rope=RopeConfig(fraction=0.3)),
    "gqa-ignores-mla-keys": config(attention=gqa(qk_rope_head_dim=3, kv_lora_rank=0)),
    "capacity": config(moe=moe(capacity_factor=1e-9)),
}


@pytest.mark.parametrize("name", [name for name in SMALLEST if name != "defaults"])
def test_what_is_accepted_trains(name):
    model = build(SMALLEST[name])
    tokens, labels = some_tokens(model.config, 2, 3)
    model(tokens, labels_BS=labels).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


def test_defaults_are_accepted():
    SMALLEST["defaults"].validate("run.yaml")


def test_which_layers_hold_experts():
    shape = config(num_layers=4, dense_layers=2, mtp_layers=1)
    model = build(shape)
    assert [layer.moe is not None for layer in model.layers.values()] == [False, False, True, True]
    assert dict(model.moe_layers()).keys() == {"2", "3", "4"}
    assert not any(config(moe=MoEConfig(num_experts=0)).is_moe(layer) for layer in range(3))
    assert torch.is_tensor(model.layers["0"].mlp.gate_up.weight)
