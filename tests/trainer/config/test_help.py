"""The help text says something about every key."""

from dataclasses import fields, is_dataclass

from trainer.config.help import config_help
from trainer.config.schema import Config


def every_key(config: object, path: str = "") -> list[tuple[str, str]]:
    """(full path, help) of every field of a config and the configs inside it; sections too."""
    found = []
    for declared in fields(config):  # type: ignore[arg-type]
        full, value = f"{path}{declared.name}", getattr(config, declared.name)
        found.append((full, declared.metadata.get("help", "")))
        if is_dataclass(value):
            found += every_key(value, f"{full}.")
    return found


def test_every_field_has_help_and_appears():
    text = config_help(width=10_000)
    keys = every_key(Config())
    assert len(keys) > 80
    for path, help in keys:
        assert help, path
        value = Config()
        for part in path.split("."):
            value = getattr(value, part)
        if is_dataclass(value):
            continue
        key, *rest = text.partition(f"\n  {path}\n")[2].split("\n")
        assert key.startswith(f"      {help} ["), path


def test_defaults_types_and_choices_are_shown():
    text = config_help(width=10_000)
    assert "peak learning rate [a number, default 0.0003]" in text
    assert "[gqa | mla, default gqa]" in text
    assert "[a number or null, default null]" in text
    assert "round the correction range to whole dimensions (off for gpt-oss) [true or false, default true]" in text
    assert "[a list of strings, default []]" in text


def test_sections_open_with_their_docstring():
    assert "\noptimizer: AdamW (arXiv 1711.05101)." in config_help(width=10_000)


def test_lines_fit_the_width():
    assert max(map(len, config_help(width=80).splitlines()[3:])) <= 80


def test_base_is_explained():
    assert "base: other.yaml" in config_help()
