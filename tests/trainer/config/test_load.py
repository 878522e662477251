"""Reading a config, and the one line that each kind of mistake gets."""

from pathlib import Path

import pytest

from backends.errors import UserError
from trainer.config.catalogue import sections
from trainer.config.load import dump_config, load_config
from trainer.config.origins import Origins
from trainer.config.schema import Config


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def message(path: str, *overrides: str) -> str:
    """The error of loading, which must be one line; temporary folders are cut away."""
    with pytest.raises(UserError) as raised:
        load_config(path, list(overrides))
    text = str(raised.value)
    assert "\n" not in text
    return text.replace(str(Path(path).parent) + "/", "")


def test_file_then_overrides_then_defaults(write):
    path = write("train: {steps: 200, micro_batch_size: 2}\noptimizer:\n  lr: 3e-4\n")
    config = load_config(path, ["train.steps=300", "data.source=text", "data.paths=[a.txt, b c.txt]", "run_dir=null"])
    assert isinstance(config, Config)
    assert (config.train.steps, config.train.micro_batch_size, config.train.log_every) == (300, 2, 1)
    assert config.optimizer.lr == 3e-4
    assert config.data.paths == ["a.txt", "b c.txt"] and type(config.data.paths) is list
    assert config.run_dir is None


def test_a_section_whose_keys_are_all_commented_out_changes_nothing(write):
    assert load_config(write("model:\n  # hidden_size: 64\n"), []) == Config()


def test_an_empty_file_gives_the_defaults(write):
    assert load_config(write(""), []) == Config()


def test_override_with_a_mapping_sets_keys_inside(write):
    assert load_config(write(""), ["model.moe={top_k: 3, num_experts: 6}"]).model.moe.top_k == 3


def test_interpolation_reads_another_key(write):
    config = load_config(
        write("data: {tokenizer: {vocab_size: 512}}\nmodel:\n  vocab_size: ${data.tokenizer.vocab_size}"), []
    )
    assert config.model.vocab_size == 512


def test_dump_is_read_back_to_an_equal_config(write):
    config = load_config(
        write("model: {moe: {capacity_factor: 1.25}}\nname: '12'"), ["data.paths=[x]", "data.source=jsonl"]
    )
    assert load_config(write(dump_config(config), "dumped.yaml"), []) == config


def test_base_comes_first_and_is_relative_to_the_file(write):
    write("train: {steps: 500, micro_batch_size: 8}\nseed: 3", "grandparent.yaml")
    write("base: ../grandparent.yaml\ntrain: {steps: 400}", "bases/parent.yaml")
    config = load_config(write("base: bases/parent.yaml\nname: child\nseed: 4"), [])
    assert (config.name, config.seed, config.train.steps, config.train.micro_batch_size) == ("child", 4, 400, 8)


def test_base_that_is_not_there(write):
    assert message(write("base: none.yaml")) == (
        "run.yaml: base: there is no file none.yaml; the path is relative to run.yaml"
    )


def test_base_that_leads_back(write):
    write("base: run.yaml", "other.yaml")
    assert message(write("base: other.yaml")) == (
        "run.yaml: base: the file is based on itself; remove one of the base keys"
    )


def test_error_in_a_base_names_the_base(write):
    write("train: {steps: many}", "parent.yaml")
    assert message(write("base: parent.yaml")).startswith("parent.yaml: train.steps: 'many' is not an integer")


def test_missing_file(tmp_path):
    assert message(str(tmp_path / "no.yaml")) == "no.yaml: there is no such config file; check --config"


def test_folder_instead_of_a_file(tmp_path):
    assert message(f"{tmp_path}/./").endswith("cannot be read (Is a directory); check --config")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  steps: 1\n seed: 2", 3),
        ("name: [a", 2),
        ("seed: 1\nname: a: b", 2),
        ("seed: 1\nseed: 2", 2),
    ],
)
def test_yaml_syntax_names_the_line(write, text, line):
    error = message(write(text))
    assert error.startswith(f"run.yaml: line {line}: not YAML (") and error.endswith("; correct that line")


def test_a_list_is_not_a_config(write):
    assert message(write("- 1\n- 2")) == "run.yaml: holds a list, not keys; write 'key: value' lines"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.hiden_size", "model.hidden_size"),
        ("modell.hidden_size", "model.hidden_size"),
        ("optimizer.warmup_steps", "schedule.warmup_steps"),
        ("top_k", "model.moe.top_k"),
        ("model.hidden_size.a", "model.hidden_size"),
    ],
)
def test_unknown_key_names_the_nearest(write, key, meant):
    *sections, last = key.split(".")
    nested = (
        "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections)) + f"{'  ' * len(sections)}{last}: 1"
    )
    assert message(write(nested)) == f"run.yaml: unknown key '{key}'; did you mean '{meant}'?"
    assert message(write(""), f"{key}=1") == f"command line: unknown key '{key}'; did you mean '{meant}'?"


def test_unknown_key_like_no_other(write):
    assert message(write("zzqq: 1")) == "run.yaml: unknown key 'zzqq'; `moebius train --help` lists every key"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.steps=abc", "train.steps: 'abc' is not an integer; the default is 1000"),
        ("train.steps=1.5", "train.steps: 1.5 is not an integer; the default is 1000"),
        ("train.steps=true", "train.steps: true is not an integer; the default is 1000"),
        ("train.steps=null", "train.steps: null is not an integer; the default is 1000"),
        ("optimizer.lr=fast", "optimizer.lr: 'fast' is not a number; the default is 0.0003"),
        ("metrics.csv=maybe", "metrics.csv: 'maybe' is not true or false; the default is false"),
        ("model.moe.capacity_factor=x", "model.moe.capacity_factor: 'x' is not a number or null; the default is null"),
        ("data.paths=a.txt", "data.paths: 'a.txt' is not a list of strings; write [a.txt]"),
        ("model=3", "model: 3 is not a section; set a key inside it, such as model.vocab_size"),
        ("train.precision=fp16", "train.precision: 'fp16' is not one of the choices; use fp32, bf16"),
        ("run_dir=???", "run_dir: has no value; set it to a string or null"),
        ("name=${nope}", "name: Interpolation key 'nope' not found; correct the ${...} or write the value"),
        ("name=[a", "name: '[a' is not a YAML value; put it in quotes"),
        ("train.steps", "'train.steps' is not an override; write key=value, as in train.steps=100"),
    ],
)
def test_wrong_value_on_the_command_line(write, override, problem):
    assert message(write(""), override) == f"command line: {problem}"


def test_wrong_value_in_a_file(write):
    assert message(write("model:\n  moe:\n    score: relu")) == (
        "run.yaml: model.moe.score: 'relu' is not one of the choices; use softmax, sigmoid"
    )


def test_the_file_is_at_fault_even_when_something_else_is_overridden(write):
    assert message(write("train: {steps: abc}"), "seed=1").startswith("run.yaml: train.steps: 'abc'")


def test_a_wrong_type_is_told_what_the_file_has(write):
    path = write("train: {steps: 500}\noptimizer: {lr: 3e-4}")
    assert message(path, "train.steps=many") == "command line: train.steps: 'many' is not an integer; run.yaml has 500"
    assert message(path, "optimizer.lr=fast") == (
        "command line: optimizer.lr: 'fast' is not a number; run.yaml has 0.0003"
    )


def test_a_value_out_of_range_is_blamed_on_whoever_set_it(write):
    write("seed: 3\ntrain: {log_every: 0}", "parent.yaml")
    path = write("base: parent.yaml\nmodel: {moe: {top_k: 2, num_experts: 4}}\nschedule: {warmup_steps: 60}")
    assert message(path) == "parent.yaml: train.log_every: is 0; it must be at least 1"
    path = write("model: {moe: {top_k: 2, num_experts: 4}}\nschedule: {warmup_steps: 60}")
    assert message(path, "seed=-1") == "command line: seed: is -1; it must be 0 or more"
    assert message(path, "model.moe.top_k=5").startswith("command line: model.moe.top_k: 5 is more than num_experts=4;")
    # The command line set the other key of the two.
    assert message(path, "model.moe.num_experts=1").startswith("run.yaml + command line: model.moe.top_k: 2 is more")
    assert message(path, "schedule.kind=wsd", "schedule.decay_steps=50", "train.steps=100").startswith(
        "run.yaml + command line: schedule.warmup_steps + schedule.decay_steps: 110 steps are more than train.steps=100"
    )
    # A key that nobody set is the file's to set.
    assert message(write(""), "data.source=text").startswith("run.yaml + command line: data.paths: is empty")
    assert message(write("data: {source: text}"), "seed=1").startswith("run.yaml: data.paths: is empty")


def every_key() -> list[str]:
    return [key.path for section in sections(Config) for key in section.keys]


@pytest.mark.parametrize("key", every_key())
def test_every_key_of_the_command_line_is_blamed_on_it(key):
    """Whatever finds something wrong names the config file; nobody but Origins knows better."""
    origins = Origins("run.yaml")
    origins.add(key, "command line", 1)
    with pytest.raises(UserError) as raised, origins.named():
        raise UserError(f"run.yaml: {key}: is 1; try 2")
    assert str(raised.value) == f"command line: {key}: is 1; try 2"


def test_other_messages_stay_as_they_are():
    origins = Origins("run.yaml")
    origins.add("data.paths", "command line", ["a"])
    for text in (
        "run.yaml: data.text_field: no such column; give data.paths=[b]",
        "a/data.paths: is not UTF-8; convert it",
        "run.yaml: damaged",
    ):
        with pytest.raises(UserError) as raised, origins.named():
            raise UserError(text)
        assert str(raised.value) == text
    with pytest.raises(UserError, match="^command line: data: is gone$"), origins.named():
        raise UserError("run.yaml: data: is gone")
