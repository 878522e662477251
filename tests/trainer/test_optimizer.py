"""Learning-rate shapes and weight-decay groups."""

import pytest

import backends
from trainer.config.schema import ScheduleConfig
from trainer.model import ModelConfig, MoETransformer
from trainer.optimizer import learning_rate, parameter_groups


def rates(steps: int = 100, **keys: object) -> list[float]:
    config = ScheduleConfig(**{"warmup_steps": 10, **keys})  # type: ignore[arg-type]
    return [learning_rate(config, 2.0, step, steps) for step in range(1, steps + 1)]


def test_warm_up_is_linear_and_never_zero() -> None:
    assert rates()[:10] == pytest.approx([0.2 * step for step in range(1, 11)])


def test_cosine_falls_to_the_minimum_at_the_last_step() -> None:
    values = rates(kind="cosine", min_ratio=0.1)
    assert values[9] == 2.0 and values[-1] == pytest.approx(0.2)
    assert values[54] == pytest.approx(1.1)  # half way between peak and minimum at half of the decay
    assert all(a > b for a, b in zip(values[9:], values[10:], strict=False))


def test_constant_stays() -> None:
    assert set(rates(kind="constant")[10:]) == {2.0}


def test_warmup_stable_decay() -> None:
    values = rates(kind="wsd", decay_steps=20, min_ratio=0.0)
    assert set(values[10:80]) == {2.0}
    assert values[89] == pytest.approx(1.0) and values[-1] == 0.0


def test_a_run_shorter_than_its_warm_up_warms_up_only() -> None:
    assert rates(steps=5)[-1] == pytest.approx(1.0)


def test_matrices_and_experts_decay_and_vectors_do_not() -> None:
    config = ModelConfig(vocab_size=64, hidden_size=16, num_layers=2, dense_layers=1)
    config.attention.bias = config.attention.sinks = True
    config.moe.linear_bias = config.moe.router_bias = True
    model = MoETransformer(config, backends.select("cpu").ops)
    groups = dense, vectors, experts, expert_biases = parameter_groups(model, 0.1)
    assert [group.weight_decay for group in groups] == [0.1, 0.0, 0.1, 0.0]
    assert [group.expert for group in groups] == [False, False, True, True]
    assert experts.names == ["layers.1.moe.experts.gate_up", "layers.1.moe.experts.down"]
    assert expert_biases.names == ["layers.1.moe.experts.gate_up_bias", "layers.1.moe.experts.down_bias"]
    assert "embed.weight" in dense.names and "layers.1.moe.router.weight" in dense.names
    assert {"layers.0.attention.q.bias", "layers.1.attention.sinks", "layers.1.moe.router.bias", "norm.weight"} <= set(
        vectors.names
    )
    assert sorted(name for group in groups for name in group.names) == sorted(n for n, _ in model.named_parameters())
