"""Every key of a config as a list: what loading checks against and what `--help` prints."""

import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from backends.key import help_of

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list of strings"}


@dataclass(frozen=True)
class Key:
    """One key: its full path (``model.moe.top_k``), type, default and meaning."""

    path: str
    kind: type
    optional: bool
    default: Any  # MISSING if the key is required
    help: str
    choices: tuple[str, ...]

    @property
    def wants(self) -> str:
        """The type in words: "an integer", "a number or null"."""
        return _WORDS[self.kind] + (" or null" if self.optional else "")


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass; ``path`` is empty for the root."""

    path: str
    intro: str
    keys: tuple[Key, ...]


def sections(root: type, path: str = "") -> Iterator[Section]:
    """The sections of a config dataclass, each before those inside it."""
    hints = get_type_hints(root)
    keys, inner = [], []
    for declared in fields(root):
        full = f"{path}.{declared.name}" if path else declared.name
        hint = hints[declared.name]
        if isinstance(hint, type) and is_dataclass(hint):
            inner.append((hint, full))
            continue
        optional = get_origin(hint) in (Union, types.UnionType)
        kind = next(a for a in get_args(hint) if a is not type(None)) if optional else hint
        default = declared.default if declared.default_factory is MISSING else declared.default_factory()
        choices = declared.metadata.get("choices", ())
        keys.append(Key(full, get_origin(kind) or kind, optional, default, help_of(declared), choices))
    yield Section(path, " ".join((root.__doc__ or "").split()), tuple(keys))
    for hint, full in inner:
        yield from sections(hint, full)


def as_yaml(value: Any) -> str:
    """A value as a person would write it in a config file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
