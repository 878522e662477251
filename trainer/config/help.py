"""The text of every key, made from the dataclasses: what `moebius train --help` prints after its flags."""

import textwrap
from collections.abc import Collection
from dataclasses import MISSING

from trainer.config.catalogue import Key, Section, as_yaml, sections
from trainer.config.schema import Config

_INTRO = """\
A config is a YAML file of the keys below; `key=value` after the flags overrides them, as in `train.steps=100`.
A file that begins with `base: other.yaml` (relative to itself) starts from the keys of that other file.
In brackets: the type and the default."""
_ONLY = """\
`key=value` overrides a key of the checkpoint's own config, as in `data.paths=[~/texts]`. In brackets: the type, and
the default where that config says nothing."""


def config_help(width: int = 100, only: Collection[str] | None = None) -> str:
    """Every key with meaning, type, choices and default, grouped by section; lines of at most ``width`` characters
    where words allow it.

    Args:
        only: the keys to show, for a command that takes no others; None: all.
    """
    parts = [_INTRO if only is None else _ONLY]
    for section in sections(Config):
        keys = [key for key in section.keys if only is None or key.path in only]
        if keys:
            parts.append(_section(section, keys, width))
    return "\n\n".join(parts)


def _section(section: Section, keys: list[Key], width: int) -> str:
    title = f"{section.path or 'top level'}: {section.intro}"
    lines = textwrap.wrap(title, width, subsequent_indent="  ", break_long_words=False)
    for key in keys:
        lines.append(f"  {key.path}")
        text = f"{key.help} [{_bracket(key)}]"
        lines += textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join(lines)


def _bracket(key: Key) -> str:
    parts = [" | ".join(key.choices) if key.choices else key.wants]
    parts.append("required" if key.default is MISSING else f"default {as_yaml(key.default)}")
    return ", ".join(parts)
