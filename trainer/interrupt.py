"""A polite stop: finish the step, save, and leave."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether SIGINT or SIGTERM has arrived. A second SIGINT interrupts at once, as without this."""

    def __init__(self) -> None:
        self.wanted = False

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = True

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catch both signals inside; the handlers of before are put back after."""
        previous = {number: signal.signal(number, self._arrived) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
