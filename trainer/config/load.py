"""From a YAML file and `key=value` overrides to a checked :class:`Config`; every error is one line."""

import difflib
import os
from collections.abc import Iterator
from typing import Any, cast

import yaml
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from backends.errors import UserError
from trainer.config.catalogue import Key, as_yaml, sections
from trainer.config.origins import COMMAND_LINE, Origins
from trainer.config.schema import Config
from trainer.config.validate import validate

BASE = "base"  # the one top-level key that is not in the schema: a file to start from


def load_config(path: str, overrides: list[str]) -> Config:
    """Read a config file, apply ``key=value`` overrides, and check every value.

    A file may begin with ``base: other.yaml`` (relative to itself): that file is applied first, and may have a
    base of its own. Keys that nobody sets keep the default of ``trainer/config/schema.py``.

    Raises:
        UserError: one line with the file (or "command line"), the full key and the remedy.
    """
    return load_with_origins(path, overrides)[0]


def load_with_origins(path: str, overrides: list[str]) -> tuple[Config, Origins]:
    """Like :func:`load_config`, with the place that each key came from, for what is found wrong with it later."""
    catalogue = list(sections(Config))
    keys = {key.path: key for section in catalogue for key in section.keys}
    section_paths = {section.path for section in catalogue}
    config = OmegaConf.structured(Config)
    origins = Origins(path)
    for where, name, value in [*_from_file(path), *from_overrides(overrides)]:
        if name in section_paths:
            if value in (None, {}):
                continue  # a header with every key commented out
            example = next(path for path in keys if path.startswith(f"{name}."))
            raise UserError(f"{where}: {name}: {value!r} is not a section; set a key inside it, such as {example}")
        if name not in keys:
            raise UserError(f"{where}: unknown key '{name}'; {_nearest(name, keys)}")
        _assign(config, keys[name], value, where, origins)
        origins.add(name, where, value)
    result = _resolve(config, keys, origins)
    with origins.named():
        validate(result, path)
    return result, origins


def dump_config(config: Config) -> str:
    """The config as YAML with every key, which :func:`load_config` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _from_file(path: str, children: tuple[str, ...] = ()) -> Iterator[tuple[str, str, Any]]:
    """(file, full key, value) of each value set in the file, those of its bases first."""
    if os.path.realpath(path) in children:
        raise UserError(f"{path}: base: the file is based on itself; remove one of the base keys")
    content = _read(path)
    base = content.pop(BASE, None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base: {base!r} is not a string; give the path of one YAML file")
        parent = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if not os.path.isfile(parent):
            raise UserError(f"{path}: base: there is no file {parent}; the path is relative to {path}")
        yield from _from_file(parent, (*children, os.path.realpath(path)))
    for name, value in _leaves(content):
        yield path, name, value


def _read(path: str) -> dict[str, Any]:
    try:
        # OmegaConf's loader, because plain YAML takes 3e-4 for a string and lets a key appear twice
        content = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file; check --config") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check --config") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; check --config") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}: line {line}: not YAML ({error.problem}); correct that line") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]}); correct the file") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: holds a list, not keys; write 'key: value' lines")
    return cast(dict[str, Any], OmegaConf.to_container(content, resolve=False))


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def from_overrides(overrides: list[str]) -> Iterator[tuple[str, str, Any]]:
    """("command line", full key, value) of each value that ``key=value`` arguments set."""
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UserError(f"{COMMAND_LINE}: '{override}' is not an override; write key=value, as in train.steps=100")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException):
            raise UserError(f"{COMMAND_LINE}: {name}: {text!r} is not a YAML value; put it in quotes") from None
        yield from ((COMMAND_LINE, *leaf) for leaf in _leaves({name: cast(dict[str, Any], value)["value"]}))


def _assign(config: DictConfig, key: Key, value: Any, where: str, origins: Origins) -> None:
    try:
        OmegaConf.update(config, key.path, value, merge=False)
    except OmegaConfBaseException:
        shown = repr(value) if isinstance(value, str) else as_yaml(value)
        had = origins.given(key.path)
        instead = f"{had[0]} has {as_yaml(had[1])}" if had else f"the default is {as_yaml(key.default)}"
        remedy = f"write [{value}]" if key.kind is list else instead
        raise UserError(f"{where}: {key.path}: {shown} is not {key.wants}; {remedy}") from None


def _resolve(config: DictConfig, keys: dict[str, Key], origins: Origins) -> Config:
    """The dataclass, with `${other.key}` replaced by the other key's value."""
    for key in keys.values():
        where = origins.of(key.path)
        try:
            value = OmegaConf.select(config, key.path, throw_on_missing=True)
        except MissingMandatoryValue:
            raise UserError(f"{where}: {key.path}: has no value; set it to {key.wants}") from None
        except OmegaConfBaseException as error:
            problem = str(error).splitlines()[0]
            raise UserError(f"{where}: {key.path}: {problem}; correct the ${{...}} or write the value") from None
        if key.choices and value not in key.choices:
            raise UserError(f"{where}: {key.path}: '{value}' is not one of the choices; use {', '.join(key.choices)}")
    return cast(Config, OmegaConf.to_object(config))


def _nearest(name: str, keys: dict[str, Key]) -> str:
    """Keys of the same last word come first: `optimizer.warmup_steps` means `schedule.warmup_steps`."""
    last = name.rpartition(".")[2]
    same = [path for path in keys if path.rpartition(".")[2] == last]
    close = difflib.get_close_matches(name, same, 1, cutoff=0) or difflib.get_close_matches(name, keys, 1)
    return f"did you mean '{close[0]}'?" if close else "`moebius train --help` lists every key"
