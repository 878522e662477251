"""Checks that types cannot express: ranges, and keys that must agree with each other."""

import math
from collections.abc import Callable

from backends.errors import UserError
from trainer.config.schema import Config


def validate(config: Config, where: str) -> None:
    """Check what one config alone can tell; the layout on a number of ranks is :func:`validate_layout`'s.

    Raises:
        UserError: ``<where>: <key>: <problem>; <remedy>``, ``where`` being the config file.
    """
    config.model.validate(where)
    _check_name(config, where)
    _check_ranges(config, where)
    _check_data(config, where)
    _check_batch(config, where)
    _check_schedule(config, where)


def validate_layout(config: Config, world_size: int, where: str) -> None:
    """Check the config against the number of ranks it runs on.

    Raises:
        UserError: the ranks do not factor into the layout, experts do not split evenly over expert-parallel ranks,
            or the global batch does not split evenly over data-parallel ranks and micro-batches.
    """
    expert, experts = config.parallel.expert, config.model.moe.num_experts
    sizes = [size for size in range(1, world_size + 1) if world_size % size == experts % size == 0]
    if experts % expert:
        _refuse(
            where,
            "parallel.expert",
            f"model.moe.num_experts={experts} is not divisible by {expert}",
            f"use {_nearest(sizes, expert)}",
        )
    if world_size % expert:
        _refuse(
            where,
            "parallel.expert",
            f"{world_size} ranks do not divide into groups of {expert}",
            f"use {_nearest(sizes, expert)}, or start a multiple of {expert} ranks",
        )
    # Expert-parallel ranks read different data, so every rank is a data-parallel rank.
    # Their share need not divide into micro-batches: the last one is smaller, on all ranks alike.
    length, unit = config.data.sequence_length, world_size
    sequences = config.train.global_batch_tokens // length
    if sequences % unit:
        below = sequences // unit * unit
        _refuse(
            where,
            "train.global_batch_tokens",
            f"{sequences} sequences of {length} tokens do not divide over {world_size} data-parallel ranks",
            f"use {_nearest([size * length for size in (below, below + unit) if size], sequences * length)}",
        )


def _check_ranges(config: Config, where: str) -> None:
    """One rule a key: what must hold of the value, and that in words."""
    count = (lambda value: value >= 1, "it must be at least 1")
    natural = (lambda value: value >= 0, "it must be 0 or more")
    positive = (lambda value: value > 0, "it must be above 0")
    share = (lambda value: 0 <= value <= 1, "it must lie between 0 and 1")
    decay = (lambda value: 0 <= value < 1, "it must be at least 0 and below 1")
    rules: dict[str, tuple[Callable[[float], bool], str]] = {
        "seed": natural,
        "model.mtp_layers": natural,
        "model.mtp_loss": natural,
        "model.norm_eps": positive,
        "model.init_std": positive,
        "model.rope.theta": positive,
        "model.rope.yarn.factor": (lambda value: value >= 1, "it must be at least 1; 1 switches YaRN off"),
        "model.moe.num_experts": natural,
        "model.moe.expert_hidden_size": count,
        "model.moe.num_shared_experts": natural,
        "model.moe.expert_bias_rate": natural,
        "model.moe.aux_loss": natural,
        "model.moe.z_loss": natural,
        "data.sequence_length": count,
        "data.validation_fraction": (lambda value: 0 < value < 1, "it must be above 0 and below 1"),
        "data.tokenizer.vocab_size": (
            lambda value: value >= 257,
            "it must be at least 257: 256 bytes and the end token",
        ),
        "optimizer.lr": positive,
        "optimizer.beta1": decay,
        "optimizer.beta2": decay,
        "optimizer.eps": positive,
        "optimizer.weight_decay": natural,
        "optimizer.clip_norm": natural,
        "schedule.warmup_steps": natural,
        "schedule.decay_steps": natural,
        "schedule.min_ratio": share,
        "train.steps": count,
        "train.global_batch_tokens": count,
        "train.micro_batch_size": count,
        "train.eval_every": natural,
        "train.eval_sequences": natural,
        "train.log_every": count,
        "parallel.expert": count,
        "parallel.timeout_minutes": positive,
        "checkpoint.every": natural,
        "checkpoint.keep": natural,
        "checkpoint.keep_every": natural,
        "metrics.peak_tflops": natural,
    }
    for key, (holds, remedy) in rules.items():
        value: float = config  # type: ignore[assignment]
        for part in key.split("."):
            value = getattr(value, part)
        if not math.isfinite(value) or not holds(value):
            _refuse(where, key, f"is {value:g}" if isinstance(value, float) else f"is {value}", remedy)


def _check_name(config: Config, where: str) -> None:
    if not config.name or "/" in config.name or config.name in (".", ".."):
        _refuse(where, "name", f"{config.name!r} is no folder name", "use letters and digits; run_dir takes a path")


def _check_data(config: Config, where: str) -> None:
    data = config.data
    if data.source != "stdlib" and not data.paths:
        wanted = "the dataset's name" if data.source == "hub" else "files, folders or globs"
        _refuse(where, "data.paths", f"is empty, but data.source={data.source}", f"list {wanted}")
    if data.source == "hub" and len(data.paths) > 1:
        _refuse(where, "data.paths", f"names {len(data.paths)} hub datasets", "name one")
    if data.source == "stdlib" and data.paths:
        _refuse(where, "data.paths", "is set, but data.source=stdlib reads none", "set data.source to text")
    if data.tokenizer.path is None and data.tokenizer.vocab_size > config.model.vocab_size:
        _refuse(
            where,
            "data.tokenizer.vocab_size",
            f"{data.tokenizer.vocab_size} exceeds model.vocab_size={config.model.vocab_size}",
            "raise model.vocab_size or lower this",
        )


def _check_batch(config: Config, where: str) -> None:
    tokens, length = config.train.global_batch_tokens, config.data.sequence_length
    if tokens % length:
        below = tokens // length * length
        _refuse(
            where,
            "train.global_batch_tokens",
            f"{tokens} is not a multiple of data.sequence_length={length}",
            f"use {_nearest([size for size in (below, below + length) if size], tokens)}",
        )


def _check_schedule(config: Config, where: str) -> None:
    schedule, steps = config.schedule, config.train.steps
    if schedule.kind == "wsd" and schedule.decay_steps < 1:
        _refuse(where, "schedule.decay_steps", "is 0, but schedule.kind=wsd decays at the end", "set it to at least 1")
    together = schedule.warmup_steps + schedule.decay_steps
    # A warm-up longer than the run is fine: a short trial of a long config should need no other change.
    if schedule.kind == "wsd" and together > steps:
        keys = "schedule.warmup_steps + schedule.decay_steps"
        _refuse(where, keys, f"{together} steps are more than train.steps={steps}", "lower them or train longer")


def _nearest(workable: list[int], value: int) -> str:
    """The two workable values around ``value``, in words."""
    below = [size for size in workable if size <= value][-1:]
    above = [size for size in workable if size > value][:1]
    return " or ".join(str(size) for size in below + above)


def _refuse(where: str, key: str, problem: str, remedy: str) -> None:
    raise UserError(f"{where}: {key}: {problem}; {remedy}")
