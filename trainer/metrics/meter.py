"""Training speed, without the time that is not training."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Meter:
    """Tokens per second over the last steps, and the time that the rest of the run takes.

    The first step, which compiles and allocates, is left out, and so is what runs inside :meth:`pause`.

    Args:
        flops_per_token: model FLOPs of one token, forward and backward (``trainer.model.count``).
        peak_flops: FLOP/s that one device can do.
        devices: devices that share the tokens given to :meth:`step`.
        window: steps of the moving average.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        flops_per_token: float,
        peak_flops: float,
        devices: int = 1,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops, self._peak, self._devices, self._clock = flops_per_token, peak_flops, devices, clock
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)
        self._since: float | None = None  # when the running step began; None until the first step is over

    def step(self, tokens: int) -> None:
        """Call at the end of each step with the tokens that all devices trained on."""
        now = self._clock()
        if self._since is not None:
            self._steps.append((tokens, now - self._since))
        self._since = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Evaluation and checkpoints run inside this."""
        began = self._clock()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += self._clock() - began

    def rates(self, steps_left: int) -> dict[str, float]:
        """The record keys that come from speed; none while only the first step is known.

        Returns:
            ``tokens_per_second`` of all devices, ``tflops`` (model TFLOP/s of one device), ``mfu`` (that over the
            device's peak, 0 to 1) and ``seconds_left`` for ``steps_left`` more steps.
        """
        seconds = sum(duration for _, duration in self._steps)
        if seconds <= 0:
            return {}
        speed = sum(tokens for tokens, _ in self._steps) / seconds
        flops = speed * self._flops / self._devices
        return {
            "tokens_per_second": speed,
            "tflops": flops / 1e12,
            "mfu": flops / self._peak,
            "seconds_left": steps_left * seconds / len(self._steps),
        }
