"""config.json to :class:`ModelConfig` and back."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

from backends.errors import UserError
from trainer.convert.family import Family, Setting
from trainer.convert.rope import rope_from, rope_to
from trainer.model.config import ModelConfig

# Weights of losses and rates of training, of which config.json knows nothing.
_TRAINING = {
    "mtp_loss",
    "residual_fp32",
    "moe.expert_bias_rate",
    "moe.aux_loss",
    "moe.z_loss",
    "moe.capacity_factor",
}
_ONLY_GQA = {"attention.num_kv_heads", "attention.head_dim", "rope.fraction"}
_ONLY_MLA = {
    f"attention.{name}" for name in "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim".split()
}


def config_from(theirs: dict[str, Any], family: Family, where: str) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
        UserError: a key is missing, has another type, or says something that this family's models here cannot be.
    """
    config = _converted(theirs, family, where)
    for key, value in {**family.always, **family.follows(config)}.items():
        if theirs.get(key, value) != value:
            raise UserError(f"{where}: {key}: is {theirs[key]!r}; only {value!r} is supported")
    for path, least in family.at_least.items():
        if attrgetter(path)(config) < least:
            key = next(key for key, setting in family.settings.items() if setting.ours == path)
            raise UserError(f"{where}: {key}: is {theirs.get(key)}; only {least} and more are supported")
    try:
        config.validate(where)
    except UserError as error:
        raise UserError(f"{error} (a key of ours; {family.name} files have others)") from None
    return config


def _converted(theirs: dict[str, Any], family: Family, where: str) -> ModelConfig:
    config = ModelConfig()
    for path, value in family.ours.items():
        _set(config, path, value)
    for key, setting in family.settings.items():
        _set(config, setting.ours, _read(theirs, key, setting, config, where))
    interleaved = config.rope.interleaved
    config.rope = rope_from(theirs, config.attention.kind == "mla", family.partial_rotary, where)
    config.rope.interleaved = interleaved
    return config


def config_to(config: ModelConfig, family: Family, where: str) -> dict[str, Any]:
    """The keys of config.json that decide what a model computes.

    Raises:
        UserError: models of this family cannot be what ``config`` says; the first such key is named.
    """
    theirs = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **family.always,
        **family.follows(config),
        **{key: _written(key, setting, config) for key, setting in family.settings.items()},
        **rope_to(config.rope, config.attention.kind == "mla", family.partial_rotary),
    }
    for path, least in family.at_least.items():
        if attrgetter(path)(config) < least:
            raise UserError(
                f"{where}: model.{path}: is {attrgetter(path)(config)}; {family.name} needs {least} or more"
            )
    back = _converted(theirs, family, f"{where}: as {family.name}")
    for path in _meaningful(config):
        mine, read = attrgetter(path)(config), attrgetter(path)(back)
        if mine != read:
            raise UserError(f"{where}: model.{path}: is {mine}; {family.name} models have {read}")
    return theirs


def family_of(config: ModelConfig, families: Mapping[str, Family], where: str) -> Family:
    """The first family that has such models.

    Raises:
        UserError: none has; says for each which key is in the way.
    """
    reasons = []
    for family in families.values():
        try:
            config_to(config, family, where)
        except UserError as error:
            reasons.append(str(error).removeprefix(f"{where}: "))
        else:
            return family
    raise UserError(f"{where}: model: is of no family that can be exported ({'; '.join(reasons)})")


def _read(theirs: dict[str, Any], key: str, setting: Setting, config: ModelConfig, where: str) -> Any:
    value = theirs.get(key, theirs.get(setting.also))
    if value is None:
        value = setting.null if key in theirs and setting.null is not None else setting.default
    if callable(value):
        value = value(theirs)
    if value is None:
        raise UserError(f"{where}: {key}: is missing; take the published config.json")
    if setting.listed:
        if not isinstance(value, list) or value != list(range(len(value))):
            raise UserError(f"{where}: {key}: is {value}; only the first layers can be dense")
        return len(value)
    now = attrgetter(setting.ours)(config)
    wanted = type(setting.default if now is None else now)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UserError(f"{where}: {key}: {value!r} is no {wanted.__name__}; take the published config.json")
    return value


def _written(key: str, setting: Setting, config: ModelConfig) -> Any:
    value = attrgetter(setting.ours)(config)
    if setting.listed:
        return list(range(value))
    return None if setting.null is not None and value == setting.null and setting.default is None else value


def _set(config: Any, path: str, value: Any) -> None:
    section, _, name = path.rpartition(".")
    setattr(attrgetter(section)(config) if section else config, name, value)


def _meaningful(config: ModelConfig) -> Iterator[str]:
    """The keys that change what this model computes."""
    unused = _TRAINING | (_ONLY_GQA if config.attention.kind == "mla" else _ONLY_MLA)
    if config.dense_layers == 0:
        unused.add("dense_hidden_size")
    for path in _paths(ModelConfig()):
        if path not in unused and not (config.rope.yarn.factor == 1 and path.startswith("rope.yarn.")):
            yield path


def _paths(config: Any, prefix: str = "") -> Iterator[str]:
    for declared in fields(config):
        value = getattr(config, declared.name)
        if is_dataclass(value):
            yield from _paths(value, f"{prefix}{declared.name}.")
        else:
            yield prefix + declared.name
