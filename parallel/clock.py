"""Where the time of a step goes, on the host or on an accelerator that runs behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from parallel.pipeline.timeline import Span


class Clock:
    """Spans of time by name. Spans may lie inside each other and may come from two threads at once.

    Args:
        device: on the CPU a span is what the host measures; on an accelerator, events in its current stream, so that
            nothing waits for the device before :meth:`take`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []  # appending is atomic
        self._actions: list[tuple[str, int, int, Any, Any]] = []
        self._origin = self._now()

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time inside under ``name``."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    @contextmanager
    def action(self, kind: str, stage: int, micro_batch: int) -> Iterator[None]:
        """Count the time inside as one action of a pipeline schedule."""
        start = self._now()
        yield
        self._actions.append((kind, stage, micro_batch, start, self._now()))

    def begin(self) -> None:
        """A pipeline's step begins: its actions are timed from here."""
        self._origin = self._now()

    def take(self) -> tuple[dict[str, float], list[Span]]:
        """Seconds under each name, and the actions, since the last call; waits for the device."""
        spans, actions, origin = self._spans, self._actions, self._origin
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds: dict[str, float] = {}
        for name, start, stop in spans:
            seconds[name] = seconds.get(name, 0.0) + _between(start, stop)
        taken = [
            Span(kind, stage, micro, _between(origin, start), _between(origin, stop))
            for kind, stage, micro, start, stop in actions
        ]
        self._spans, self._actions = [], []
        return seconds, taken


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
