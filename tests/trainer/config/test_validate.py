"""Ranges, keys that must agree, and the layout on a number of ranks."""

import pytest

from backends.errors import UserError
from parallel.pipeline.order import SCHEDULES
from trainer.config.schema import Config
from trainer.config.validate import validate, validate_layout


def config_with(**values) -> Config:
    """The default config with values at paths written with two underscores for a dot."""
    config = Config()
    for path, value in values.items():
        *sections, name = path.split("__")
        owner = config
        for section in sections:
            owner = getattr(owner, section)
        assert hasattr(owner, name)
        setattr(owner, name, value)
    return config


def refusal(**values) -> str:
    with pytest.raises(UserError) as raised:
        validate(config_with(**values), "x.yaml")
    return str(raised.value)


def test_the_defaults_are_valid():
    validate(Config(), "x.yaml")
    validate_layout(Config(), 1, "x.yaml")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"train__steps": 0}, "x.yaml: train.steps: is 0; it must be at least 1"),
        ({"train__micro_batch_size": 0}, "x.yaml: train.micro_batch_size: is 0; it must be at least 1"),
        ({"data__sequence_length": 0}, "x.yaml: data.sequence_length: is 0; it must be at least 1"),
        ({"train__log_every": 0}, "x.yaml: train.log_every: is 0; it must be at least 1"),
        ({"train__eval_every": -1}, "x.yaml: train.eval_every: is -1; it must be 0 or more"),
        ({"optimizer__lr": 0.0}, "x.yaml: optimizer.lr: is 0; it must be above 0"),
        ({"optimizer__lr": float("nan")}, "x.yaml: optimizer.lr: is nan; it must be a finite number"),
        ({"optimizer__lr": float("inf")}, "x.yaml: optimizer.lr: is inf; it must be a finite number"),
        ({"optimizer__beta2": 1.0}, "x.yaml: optimizer.beta2: is 1; it must be at least 0 and below 1"),
        ({"optimizer__clip_norm": -1.0}, "x.yaml: optimizer.clip_norm: is -1; it must be 0 or more"),
        ({"schedule__min_ratio": 1.5}, "x.yaml: schedule.min_ratio: is 1.5; it must lie between 0 and 1"),
        ({"data__validation_fraction": 1.0}, "x.yaml: data.validation_fraction: is 1; it must be above 0 and below 1"),
        ({"parallel__zero": 3}, "x.yaml: parallel.zero: is 3; it must be 1 or 2"),
        ({"parallel__expert": 0}, "x.yaml: parallel.expert: is 0; it must be at least 1"),
        ({"seed": -1}, "x.yaml: seed: is -1; it must be 0 or more"),
        (
            {"model__moe__top_k": 9},
            "x.yaml: model.moe.top_k: 9 is more than num_experts=8; set it between 1 and 8",
        ),
        (
            {"name": "../evil"},
            "x.yaml: name: '../evil' is no folder name; use letters and digits; run_dir takes a path",
        ),
        (
            {"train__global_batch_tokens": 1000},
            "x.yaml: train.global_batch_tokens: 1000 is not a multiple of data.sequence_length=512; use 512 or 1024",
        ),
        (
            {"train__global_batch_tokens": 100},
            "x.yaml: train.global_batch_tokens: 100 is not a multiple of data.sequence_length=512; use 512",
        ),
        (
            {"schedule__kind": "wsd", "schedule__decay_steps": 901},
            "x.yaml: schedule.warmup_steps + schedule.decay_steps: 1001 steps are more than train.steps=1000; "
            "lower them or train longer",
        ),
        (
            {"schedule__kind": "wsd"},
            "x.yaml: schedule.decay_steps: is 0, but schedule.kind=wsd decays at the end; set it to at least 1",
        ),
        (
            {"data__source": "jsonl"},
            "x.yaml: data.paths: is empty, but data.source=jsonl; list files, folders or globs",
        ),
        ({"data__source": "hub"}, "x.yaml: data.paths: is empty, but data.source=hub; list the dataset's name"),
        ({"data__source": "hub", "data__paths": ["a", "b"]}, "x.yaml: data.paths: names 2 hub datasets; name one"),
        (
            {"data__paths": ["a.txt"]},
            "x.yaml: data.paths: is set, but data.source=stdlib reads none; set data.source to text",
        ),
        (
            {"data__tokenizer__vocab_size": 9000},
            "x.yaml: data.tokenizer.vocab_size: 9000 exceeds model.vocab_size=8192; "
            "raise model.vocab_size or lower this",
        ),
    ],
)
def test_refusals(values, error):
    assert refusal(**values) == error


def test_what_reaches_the_limits_is_valid():
    wsd = {"schedule__kind": "wsd", "schedule__decay_steps": 900, "schedule__warmup_steps": 100}
    validate(config_with(**wsd, train__eval_every=0, optimizer__clip_norm=0.0, schedule__min_ratio=0.0), "x.yaml")
    validate(config_with(schedule__kind="cosine", schedule__decay_steps=5000), "x.yaml")


def layout_refusal(world_size: int, **values) -> str:
    with pytest.raises(UserError) as raised:
        validate_layout(config_with(**values), world_size, "x.yaml")
    return str(raised.value)


def test_zero_2_has_no_pipeline():
    assert layout_refusal(4, parallel__zero=2, parallel__pipeline=2, model__num_layers=4) == (
        "x.yaml: parallel.zero: 2 sums the gradients of every micro-batch over ranks, which parallel.pipeline=2 has in "
        "flight together; use parallel.zero=1"
    )
    validate_layout(config_with(parallel__zero=2), 4, "x.yaml")


def test_deepep_sends_bf16_one_pass_at_a_time():
    wanted = {"parallel__dispatcher": "deepep", "parallel__expert": 2}
    assert layout_refusal(2, **wanted, train__precision="fp32") == (
        "x.yaml: parallel.dispatcher: deepep sends bf16, and train.precision is fp32; use train.precision=bf16, or "
        "all-to-all"
    )
    pipeline = {"parallel__pipeline": 2, "parallel__schedule": "dualpipev", "model__num_layers": 4}
    assert layout_refusal(4, **wanted, **pipeline, train__precision="bf16") == (
        "x.yaml: parallel.dispatcher: deepep serves one pass at a time, and parallel.schedule=dualpipev runs two; use "
        "another schedule, or all-to-all"
    )
    validate_layout(config_with(**wanted, train__precision="bf16"), 2, "x.yaml")
    validate_layout(config_with(parallel__dispatcher="deepep", train__precision="fp32"), 2, "x.yaml")  # no experts move


def test_experts_that_do_not_split():
    assert layout_refusal(12, parallel__expert=3) == (
        "x.yaml: parallel.expert: model.moe.num_experts=8 is not divisible by 3; use 2 or 4"
    )


def test_ranks_that_do_not_factor():
    assert layout_refusal(6, parallel__expert=4) == (
        "x.yaml: parallel.expert: 6 ranks do not divide into groups of 4; use 2, or start a multiple of 4 ranks"
    )


def test_advice_on_expert_parallelism_always_works():
    """The sizes named divide both the ranks and the experts."""
    for ranks in range(1, 17):
        for size in range(1, 9):
            if 8 % size == 0 and ranks % size == 0:
                continue
            text = layout_refusal(ranks, parallel__expert=size)
            named = text.partition("use ")[2].partition(", or")[0].split(" or ")
            assert all(8 % int(choice) == 0 and ranks % int(choice) == 0 for choice in named), text


def test_batch_that_does_not_split():
    # 32 sequences; the multiples of 3 around it are 30 and 33
    assert layout_refusal(3) == (
        "x.yaml: train.global_batch_tokens: 32 sequences of 512 tokens do not divide over 3 data-parallel ranks; "
        "use 15360 or 16896"
    )


def test_batch_smaller_than_a_sequence_a_rank():
    assert layout_refusal(64).endswith("use 32768")


def test_layouts_that_work():
    for world_size, expert in [(1, 1), (2, 2), (8, 2), (8, 8), (4, 1)]:
        validate_layout(config_with(parallel__expert=expert), world_size, "x.yaml")


def pipeline_refusal(world_size: int = 4, layers: int = 8, sequences: int = 16, **values) -> str:
    """Of a config with 16 sequences in a batch, one in each micro-batch."""
    batch = {"train__global_batch_tokens": 512 * sequences, "model__num_layers": layers}
    return layout_refusal(world_size, **batch, **values)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (
            {"parallel__pipeline": 3},
            "parallel.pipeline: 4 ranks do not divide into 3 pipeline ranks; "
            "use 2 or 4, or start a multiple of 3 ranks",
        ),
        (
            {"parallel__pipeline": 4, "parallel__schedule": "zbv", "layers": 7},
            "parallel.pipeline: 8 stages (4 ranks under zbv) are more than model.num_layers=7; "
            "use fewer ranks or a schedule with fewer stages a rank",
        ),
        (
            {"parallel__pipeline": 2, "parallel__stages_per_rank": 2},
            "parallel.stages_per_rank: is 2, but parallel.schedule=1f1b has 1 on each rank; use 1 or 0",
        ),
        (
            {"parallel__pipeline": 2, "parallel__layers_per_stage": [5, 4]},
            "parallel.layers_per_stage: [5, 4] does not share out model.num_layers=8 over 2 stages; "
            "list 2 numbers of at least 1 that sum to 8, or leave it empty",
        ),
        (
            {"parallel__pipeline": 2, "parallel__expert": 4},
            "parallel.expert: 2 ranks of a stage do not divide into groups of 4; use 2, or start a multiple of 8 ranks",
        ),
        (
            {"parallel__pipeline": 4, "sequences": 2},
            "parallel.schedule: 1f1b needs at least 4 micro-batches on 4 ranks, one for each, not 2; use 4; there are "
            "train.global_batch_tokens / (data.sequence_length * data-parallel ranks * train.micro_batch_size) = 2",
        ),
        (
            {"parallel__pipeline": 2, "train__micro_batch_size": 3},
            "train.global_batch_tokens: 16 sequences of 512 tokens do not divide over 2 data-parallel ranks and "
            "micro-batches of 3; use 6144 or 9216",
        ),
    ],
)
def test_pipelines_that_cannot_be(values, error):
    values = {"train__micro_batch_size": 1, **values}
    assert pipeline_refusal(**values) == f"x.yaml: {error}"


def test_pipelines_that_work():
    small = {"train__global_batch_tokens": 512 * 16, "train__micro_batch_size": 1}
    for schedule in SCHEDULES:
        validate_layout(config_with(**small, parallel__pipeline=4, parallel__schedule=schedule), 4, "x.yaml")
    uneven = {"parallel__pipeline": 2, "parallel__layers_per_stage": [7, 1], "parallel__expert": 2}
    validate_layout(config_with(**small, **uneven), 8, "x.yaml")


def test_a_dense_model_has_no_experts_to_split():
    validate(config_with(model__moe__num_experts=0), "x.yaml")
    validate_layout(config_with(model__moe__num_experts=0), 2, "x.yaml")
