"""Throughput, expert load and units."""

import math

import pytest
import torch

from trainer.metrics.expert_load import expert_load
from trainer.metrics.meter import Meter
from trainer.metrics.units import duration, si


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock, window: int = 20) -> Meter:
    return Meter(flops_per_token=1e6, peak_flops=5e9, devices=2, window=window, clock=clock)


def test_rates_of_steady_steps():
    clock = Clock()
    speed = meter(clock)
    for _ in range(4):
        clock.now += 0.5
        speed.step(1000)
    assert speed.rates(steps_left=10) == pytest.approx(
        {"tokens_per_second": 2000, "tflops": 1e-3, "mfu": 0.2, "seconds_left": 5.0}
    )


def test_first_step_pauses_and_what_comes_before_are_left_out():
    clock = Clock()
    speed = meter(clock)
    with speed.pause():
        clock.now += 50  # an evaluation before training
    clock.now += 30  # compilation
    speed.step(1000)
    assert speed.rates(9) == {}
    clock.now += 0.5
    with speed.pause():
        clock.now += 60
    clock.now += 0.5
    speed.step(1000)
    with speed.pause():
        clock.now += 7
    clock.now += 1
    speed.step(1000)
    assert speed.rates(8)["tokens_per_second"] == pytest.approx(1000)
    assert speed.rates(8)["seconds_left"] == pytest.approx(8)


def test_a_pause_that_raises_is_left_out_too():
    clock = Clock()
    speed = meter(clock)
    speed.step(1)
    with pytest.raises(ValueError), speed.pause():
        clock.now += 5
        raise ValueError
    clock.now += 1
    speed.step(100)
    assert speed.rates(1)["tokens_per_second"] == pytest.approx(100)


def test_only_the_window_counts():
    clock = Clock()
    speed = meter(clock, window=3)
    for seconds in [1, 9, 9, 9, 2, 2, 2]:
        clock.now += seconds
        speed.step(100)
    assert speed.rates(1)["tokens_per_second"] == pytest.approx(50)


def test_expert_load():
    load = expert_load(
        {
            "1": torch.tensor([5, 5, 5, 5]),
            "2": torch.tensor([20, 0, 0, 0]),
            "10": torch.tensor([3, 1]),
            "11": torch.tensor([7]),
        }
    )
    assert load["1"] == pytest.approx({"max_over_mean": 1.0, "entropy": 1.0})
    assert load["2"] == pytest.approx({"max_over_mean": 4.0, "entropy": 0.0})
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert load["10"] == pytest.approx({"max_over_mean": 1.5, "entropy": expected})
    assert load["11"] == pytest.approx({"max_over_mean": 1.0, "entropy": 1.0})
    assert math.isnan(expert_load({"0": torch.zeros(4)})["0"]["max_over_mean"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (7, "7"), (512, "512"), (0.5, "0.50"), (999.4, "999"), (999.6, "1.00k"), (1234, "1.23k"),
        (12345, "12.3k"), (999_999, "1.00M"), (9.996, "10.0"), (671e9, "671B"), (1.04e12, "1.04T"), (15e12, "15T"),
    ],
)  # fmt: skip
def test_si(value, text):
    assert si(value) == text


def test_si_with_a_unit():
    assert si(198.2e9, "FLOP/s") == "198 GFLOP/s" and si(1e15, "FLOP") == "1 PFLOP"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.21, "4.2s"), (59.96, "1m 00s"), (185, "3m 05s"), (3599.7, "1h 00m"), (7620, "2h 07m"), (273600, "3d 04h"),
    ],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text
