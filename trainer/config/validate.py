"""Checks that types cannot express: ranges, and keys that must agree with each other."""

from backends.errors import UserError
from parallel.pipeline.order import SCHEDULES, check
from trainer.config.ranges import COUNT, NATURAL, POSITIVE, Rule, check_ranges
from trainer.config.schema import Config

_DECAY = Rule(lambda value: 0 <= value < 1, "it must be at least 0 and below 1")

# The model's own are in ModelConfig.validate.
_RANGES = {
    "seed": NATURAL,
    "data.sequence_length": COUNT,
    "data.validation_fraction": Rule(lambda value: 0 < value < 1, "it must be above 0 and below 1"),
    "data.tokenizer.vocab_size": Rule(
        lambda value: value >= 257, "it must be at least 257: 256 bytes and the end token"
    ),
    "optimizer.lr": POSITIVE,
    "optimizer.beta1": _DECAY,
    "optimizer.beta2": _DECAY,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NATURAL,
    "optimizer.clip_norm": NATURAL,
    "schedule.warmup_steps": NATURAL,
    "schedule.decay_steps": NATURAL,
    "schedule.min_ratio": Rule(lambda value: 0 <= value <= 1, "it must lie between 0 and 1"),
    "train.steps": COUNT,
    "train.global_batch_tokens": COUNT,
    "train.micro_batch_size": COUNT,
    "train.eval_every": NATURAL,
    "train.eval_sequences": NATURAL,
    "train.log_every": COUNT,
    "parallel.expert": COUNT,
    "parallel.pipeline": COUNT,
    "parallel.timeout_minutes": POSITIVE,
    "parallel.stages_per_rank": NATURAL,
    "parallel.zero": Rule(lambda value: value in (1, 2), "it must be 1 or 2"),
    "checkpoint.every": NATURAL,
    "checkpoint.keep": NATURAL,
    "checkpoint.keep_every": NATURAL,
    "metrics.peak_tflops": NATURAL,
    "metrics.trace_step": NATURAL,
}


def validate(config: Config, where: str) -> None:
    """Check what one config alone can tell; the layout on a number of ranks is :func:`validate_layout`'s.

    Raises:
        UserError: ``<where>: <key>: <problem>; <remedy>``, ``where`` being the config file.
    """
    config.model.validate(where)
    _check_name(config, where)
    check_ranges(config, _RANGES, where)
    _check_data(config, where)
    _check_batch(config, where)
    _check_schedule(config, where)


def validate_layout(config: Config, world_size: int, where: str) -> None:
    """Check the config against the number of ranks it runs on.

    Raises:
        UserError: the ranks do not factor into the layout, layers into stages, experts do not split evenly over
            expert-parallel ranks, the global batch over data-parallel ranks and micro-batches, the schedule cannot
            run so many micro-batches, ZeRO-2 meets a pipeline, or DeepEP what it cannot serve.
    """
    _check_pipeline(config, world_size, where)
    expert, experts = config.parallel.expert, config.model.moe.num_experts
    pipelines = world_size // config.parallel.pipeline  # each rank of a stage is one of so many
    sizes = [size for size in range(1, pipelines + 1) if pipelines % size == experts % size == 0]
    if experts % expert:
        _refuse(
            where,
            "parallel.expert",
            f"model.moe.num_experts={experts} is not divisible by {expert}",
            f"use {_nearest(sizes, expert)}",
        )
    if pipelines % expert:
        _refuse(
            where,
            "parallel.expert",
            f"{'1 rank' if pipelines == 1 else f'{pipelines} ranks'}{' of a stage' * (config.parallel.pipeline > 1)} "
            f"{'does' if pipelines == 1 else 'do'} not divide into groups of {expert}",
            f"use {_nearest(sizes, expert)}, or start a multiple of {expert * config.parallel.pipeline} ranks",
        )
    _check_dispatcher(config, where)
    # Expert-parallel ranks read different data, so every rank of a stage is a data-parallel rank.
    # Without a pipeline their share need not divide into micro-batches: the last one is smaller, on all ranks alike.
    length, micro = config.data.sequence_length, config.train.micro_batch_size
    sequences = config.train.global_batch_tokens // length
    unit = pipelines * micro if config.parallel.pipeline > 1 else pipelines
    if sequences % unit:
        below = sequences // unit * unit
        micros = f" and micro-batches of {micro}" if unit != pipelines else ""
        _refuse(
            where,
            "train.global_batch_tokens",
            f"{sequences} sequences of {length} tokens do not divide over {pipelines} data-parallel ranks{micros}",
            f"use {_nearest([size * length for size in (below, below + unit) if size], sequences * length)}",
        )
    if config.parallel.pipeline > 1:
        _check_schedule_order(config, sequences // unit, where)


def _check_pipeline(config: Config, world_size: int, where: str) -> None:
    layout, layers = config.parallel, config.model.num_layers
    if world_size % layout.pipeline:
        sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
        ranks = "1 rank does" if world_size == 1 else f"{world_size} ranks do"
        _refuse(
            where,
            "parallel.pipeline",
            f"{ranks} not divide into {layout.pipeline} pipeline ranks",
            f"use {_nearest(sizes, layout.pipeline)}, or start a multiple of {layout.pipeline} ranks",
        )
    if layout.pipeline == 1:
        return
    chunks = SCHEDULES[layout.schedule].chunks
    if chunks is not None and layout.stages_per_rank not in (0, chunks):
        _refuse(
            where,
            "parallel.stages_per_rank",
            f"is {layout.stages_per_rank}, but parallel.schedule={layout.schedule} has {chunks} on each rank",
            f"use {chunks} or 0",
        )
    if layout.zero == 2:
        _refuse(
            where,
            "parallel.zero",
            f"2 sums the gradients of every micro-batch over ranks, which parallel.pipeline={layout.pipeline} has in "
            "flight together",
            "use parallel.zero=1",
        )
    if layout.stages > layers:
        _refuse(
            where,
            "parallel.pipeline",
            f"{layout.stages} stages ({layout.pipeline} ranks under {layout.schedule}) are more than "
            f"model.num_layers={layers}",
            "use fewer ranks or a schedule with fewer stages a rank",
        )
    given = layout.layers_per_stage
    if given and (len(given) != layout.stages or sum(given) != layers or min(given) < 1):
        _refuse(
            where,
            "parallel.layers_per_stage",
            f"{list(given)} does not share out model.num_layers={layers} over {layout.stages} stages",
            f"list {layout.stages} numbers of at least 1 that sum to {layers}, or leave it empty",
        )


def _check_dispatcher(config: Config, where: str) -> None:
    layout, precision = config.parallel, config.train.precision
    if layout.dispatcher != "deepep" or layout.expert == 1:
        return
    if precision != "bf16":
        _refuse(
            where,
            "parallel.dispatcher",
            f"deepep sends bf16, and train.precision is {precision}",
            "use train.precision=bf16, or all-to-all",
        )
    if layout.overlaps:
        _refuse(
            where,
            "parallel.dispatcher",
            f"deepep serves one pass at a time, and parallel.schedule={layout.schedule} runs two",
            "use another schedule, or all-to-all",
        )


def _check_schedule_order(config: Config, micro_batches: int, where: str) -> None:
    layout = config.parallel
    try:
        check(layout.schedule, layout.pipeline, micro_batches, layout.stages // layout.pipeline)
    except ValueError as error:
        raise UserError(
            f"{where}: parallel.schedule: {error}; there are train.global_batch_tokens / (data.sequence_length * "
            f"data-parallel ranks * train.micro_batch_size) = {micro_batches}"
        ) from error


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
