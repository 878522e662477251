"""What a pair of DualPipeV does when a part of it fails, on stages that are no more than that."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.schedules import FORWARD, FULL_BACKWARD, OVERLAP_F_B, _Action

from parallel.pipeline.lane import Lane
from parallel.pipeline.overlap import Pairs

LANE = Lane()
PAIR = _Action(-1, OVERLAP_F_B, None, (_Action(0, FORWARD, 5), _Action(3, FULL_BACKWARD, 2)))


def run(forward: Any, backward: Any, lanes: Any = (LANE, LANE)) -> None:
    """The pair F of stage 0 and B of stage 3, on the first rank of two."""
    first, last = lanes
    stages = [
        SimpleNamespace(stage_index=0, is_first=True, is_last=False, forward_in_lane=forward, lane=first),
        SimpleNamespace(stage_index=3, is_first=False, is_last=True, backward_in_lane=backward, lane=last),
    ]
    schedule = SimpleNamespace(
        _stages=stages,
        _has_backward=True,
        _n_microbatches=8,
        _maybe_compute_loss=lambda *_: None,
        _maybe_get_loss=lambda stage, micro_batch: f"loss {micro_batch}",
        backward_counter={3: 7},
    )
    everything = [()] * 8
    ctx = SimpleNamespace(schedule_ref=schedule, arg_mbs=everything, kwarg_mbs=everything, target_mbs=everything)
    Pairs(torch.device("cpu"))(PAIR, ctx)


def test_each_part_is_called_as_torch_would() -> None:
    calls = {}

    def forward(micro_batch: int, save_output: bool) -> None:
        calls["F"] = (micro_batch, save_output, threading.current_thread() is threading.main_thread())

    def backward(micro_batch: int, loss: Any, last: bool) -> None:
        calls["B"] = (micro_batch, loss, last, threading.current_thread() is threading.main_thread())

    run(forward, backward)
    assert calls["F"] == (5, False, True)
    assert calls["B"] == (2, "loss 2", True, False)


def test_lanes_begin_before_both_parts_and_end_after_both() -> None:
    told: list[str] = []

    class Told(Lane):
        def begin(self) -> None:
            told.append("begin")

        def end(self) -> None:
            told.append("end")

    run(lambda *_, **__: told.append("part"), lambda *_: told.append("part"), (Told(), Told()))
    assert told == ["begin", "begin", "part", "part", "end", "end"]


def test_a_failed_backward_is_raised() -> None:
    def backward(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(lambda *_, **__: None, backward)


def test_a_failed_forward_is_raised_when_the_backward_has_ended() -> None:
    failed, ended = threading.Event(), threading.Event()

    def forward(*_: Any, **__: Any) -> None:
        failed.set()
        raise ZeroDivisionError

    def backward(*_: Any, **__: Any) -> None:
        assert failed.wait(60)
        ended.set()

    with pytest.raises(ZeroDivisionError):
        run(forward, backward)
    assert ended.is_set()


def test_when_both_fail_both_are_told() -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    def backward(*_: Any, **__: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError) as raised:
        run(forward, backward)
    assert isinstance(raised.value.__context__, ZeroDivisionError)
