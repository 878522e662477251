"""Where each key of a config got its value: its file, a base of that, or the command line; and messages that say so."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from backends.errors import UserError

COMMAND_LINE = "command line"


class Origins:
    """The place and the raw value of every key that somebody has set.

    Args:
        path: the config file, which answers for the keys that nobody has set.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._given: dict[str, tuple[str, Any]] = {}

    def add(self, key: str, where: str, value: Any) -> None:
        """``key`` got ``value`` from ``where``, which overrides what it had."""
        self._given[key] = where, value

    def given(self, key: str) -> tuple[str, Any] | None:
        """(place, value) of a key; None if it has its default."""
        return self._given.get(key)

    def of(self, key: str) -> str:
        """The place to name in a message about a key, or about a section, where the command line comes first."""
        places = [where for name, (where, _) in self._given.items() if f"{name}.".startswith(f"{key}.")]
        return COMMAND_LINE if COMMAND_LINE in places else (places or [self.path])[-1]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let each ``<config file>: <key>: ...`` that is raised inside begin with the place that the key came from.

        This is the one place that knows it: whoever finds a mistake names the config file and the key.
        """
        try:
            yield
        except UserError as error:
            raise UserError(self._corrected(str(error))) from error

    def _corrected(self, message: str) -> str:
        start = f"{self.path}: "
        if not message.startswith(start):
            return message
        subject, colon, said = message.removeprefix(start).partition(": ")
        keys = subject.split(" + ")
        if not colon or not all(re.fullmatch(r"[a-z_0-9.]+", key) for key in keys):
            return message
        # Another key that the value does not fit, as in "2 is more than num_experts=1".
        others = re.findall(r"([a-z_0-9.]+)=", said.partition("; ")[0])
        blamed = {self.of(key) for key in keys} | {COMMAND_LINE for other in others if self._overridden(other)}
        if len(keys) == 1 and self.of(subject) == COMMAND_LINE:
            blamed = {COMMAND_LINE}
        return f"{' + '.join(sorted(blamed, key=lambda place: place == COMMAND_LINE))}: {subject}: {said}"

    def _overridden(self, name: str) -> bool:
        """Whether the command line set a key of this full name, or of this last part of it."""
        given = self._given.items()
        return any(f".{key}".endswith(f".{name}") and where == COMMAND_LINE for key, (where, _) in given)
