"""What a lane makes streams wait for, on streams that write it down."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.pipeline.lane import Lane


class Stream:
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: "Stream") -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.told.append(f"into {self.name}")

    def __exit__(self, *_: Any) -> None:
        self.told.append(f"out of {self.name}")


@pytest.fixture
def told(monkeypatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: Stream("main", told))
    return told


def test_a_lane_waits_and_is_waited_for(told):
    with Lane(Stream("lane", told)).joined():
        told.append("work")
    assert told == ["lane waits for main", "into lane", "work", "out of lane", "main waits for lane"]


def test_it_is_waited_for_after_a_failure_too(told):
    with pytest.raises(ZeroDivisionError), Lane(Stream("lane", told)).joined():
        raise ZeroDivisionError
    assert told[-2:] == ["out of lane", "main waits for lane"]


def test_a_tensor_of_another_lane_is_kept(told):
    lane, kept = Stream("lane", told), []
    tensor: Any = SimpleNamespace(record_stream=kept.append)
    Lane(lane).take(tensor)
    Lane(lane).take(None)  # a stage that needs no gradient of its input
    Lane().take(tensor)
    assert kept == [lane]


def test_without_a_stream_of_its_own_nothing_waits(told):
    with Lane().joined():
        told.append("work")
    assert told == ["work"]
