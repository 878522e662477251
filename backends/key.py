"""How a config dataclass declares one key: its default and the sentence that `--help` prints."""

from dataclasses import MISSING, Field, field
from typing import Any


def key(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with a meaning.

    Args:
        default: the default value; a callable (``list``, a dataclass) is called for each instance;
            ``MISSING`` from dataclasses makes the key required.
        help: one sentence for ``--help``.
        choices: the only values allowed, for a string key; checked when the config is loaded.
    """
    metadata = {"help": help, "choices": choices}
    if default is MISSING:
        return field(metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def help_of(declared: Field) -> str:
    """The sentence of a field made by :func:`key`; empty for a plain field."""
    return str(declared.metadata.get("help", ""))
