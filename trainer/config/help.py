"""The text of every key, made from the dataclasses: what `moebius train --help` prints after its flags."""

import textwrap
from dataclasses import MISSING

from trainer.config.catalogue import Key, Section, as_yaml, sections
from trainer.config.schema import Config

_INTRO = """\
A config is a YAML file of the keys below; `key=value` after the flags overrides them, as in `train.steps=100`.
A file that begins with `base: other.yaml` (relative to itself) starts from the keys of that other file.
In brackets: the type and the default."""


def config_help(width: int = 100) -> str:
    """Every key with meaning, type, choices and default, grouped by section; lines of at most ``width`` characters
    where words allow it."""
    return "\n\n".join([_INTRO, *(_section(section, width) for section in sections(Config) if section.keys)])


def _section(section: Section, width: int) -> str:
    title = f"{section.path or 'top level'}: {section.intro}"
    lines = textwrap.wrap(title, width, subsequent_indent="  ", break_long_words=False)
    for key in section.keys:
        lines.append(f"  {key.path}")
        text = f"{key.help} [{_bracket(key)}]"
        lines += textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join(lines)


def _bracket(key: Key) -> str:
    parts = [" | ".join(key.choices) if key.choices else key.wants]
    parts.append("required" if key.default is MISSING else f"default {as_yaml(key.default)}")
    return ", ".join(parts)
