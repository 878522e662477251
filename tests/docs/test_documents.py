"""What the documents say is so: their commands run, their configs load, and what they name exists."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launch import cli
from tests.distributed.ranks import environment, free_port, run_alone
from tests.docs.commands import BY_CI, INSIDE, NOT_HERE, NOT_IN_THE_CHECKOUT, OTHER_FLAGS, RANKS, SAME, STARTED, TRAIN
from tests.docs.documents import DOCUMENTS, ROOT, anchors, blocks, commands, links, prose, spans
from trainer.config.catalogue import sections
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.config.validate import validate_layout

COMMANDS = commands()
CONFIGS = [block for document in DOCUMENTS for block in blocks(document) if block.language == "yaml"]
KEYS = {key.path for section in sections(Config) for key in section.keys}
SECTIONS = {section.path for section in sections(Config)}
PORT_FLAG = {"deepspeed": "--master_port", "torchrun": "--master-port"}


@dataclass
class Sandbox:
    """A folder that looks like a checkout, and what ran in it."""

    folder: Path
    outputs: dict[str, str] = field(default_factory=dict)

    def start(self, command: str) -> str:
        """Output of a command of ``STARTED``, which runs once."""
        how = STARTED[command]
        if command not in self.outputs:
            if how.needs:
                self.start(how.needs)
            words = shlex.split(command)
            if words[0] in PORT_FLAG:
                words[1:1] = [PORT_FLAG[words[0]], str(free_port())]
            folder = Path(sys.executable).parent
            path = f"{folder}{os.pathsep}{os.environ['PATH']}"
            if how.trains:
                words = [*words, *how.overrides, f"data.cache_dir={self.folder}/cache"]
            code, output = run_alone(words, self.folder, environment(PATH=path, HOME=str(self.folder / "home")))
            assert code == 0, f"{command}\n{output[-6000:]}"
            self.outputs[command] = output
        return self.outputs[command]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "launch").symlink_to(ROOT / "launch")
    for block in CONFIGS:
        (folder / _file_of(block.text)).write_text(block.text)
    texts = folder / "home" / "texts"
    texts.mkdir(parents=True)
    for number in range(200):
        (texts / f"{number}.txt").write_text(f"the expert of token {number} is expert {number % 7}\n" * 3)
    return Sandbox(folder)


@pytest.fixture
def inside(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(sandbox.folder)
    monkeypatch.setenv("HOME", str(sandbox.folder / "home"))
    yield


def _file_of(text: str) -> str:
    """The file that a YAML block says it is: its first line."""
    named = re.match(r"# (configs/[\w-]+\.yaml)\n", text)
    assert named, f"a YAML block begins with its file, as in '# configs/mine.yaml':\n{text}"
    return named[1]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_every_command_is_in_one_table(command):
    tables = [INSIDE, STARTED, SAME, BY_CI, NOT_HERE]
    found = sum(command.text in table for table in tables)
    assert found == 1, f"{command.place}: `{command.text}` is in {found} tables of tests/docs/commands.py"


@pytest.mark.parametrize("command", [*INSIDE, *STARTED, *SAME, *BY_CI, *NOT_HERE])
def test_no_table_has_a_command_that_no_document_has(command):
    assert command in {documented.text for documented in COMMANDS}


def _by_cost(command):
    """Each takes seconds to start; one of them stands for all where every second counts."""
    return command if command == TRAIN else pytest.param(command, marks=pytest.mark.slow)


@pytest.mark.parametrize("command", [_by_cost(command) for command in STARTED])
def test_a_command_that_trains(sandbox, command):
    assert STARTED[command].shows in sandbox.start(command)


@pytest.mark.parametrize(
    "command", [command for command in {**STARTED, **NOT_HERE} if "train" in command and " --config " in command]
)
def test_a_layout_fits_its_config_without_what_the_tests_add(sandbox, inside, command):
    ranks = next((ranks for words, ranks in RANKS.items() if command.startswith(words)), 1)
    path, *rest = shlex.split(command.partition(" --config ")[2])
    if not Path(path).exists():
        sandbox.start(STARTED[command].needs)
    config = load_config(path, [word for word in rest if "=" in word and not word.startswith("--")])
    validate_layout(config, ranks, path)


@pytest.mark.parametrize("command", INSIDE)
def test_a_command_that_does_not_train(sandbox, inside, command):
    how = INSIDE[command]
    if how.needs:
        sandbox.start(how.needs)
    program, *arguments = shlex.split(command)
    assert program == "moebius"
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        try:
            code = cli.main(arguments)
        except SystemExit as exit:  # argparse, after --help
            code = int(exit.code or 0)
    assert code == how.code, written.getvalue()
    assert how.shows in written.getvalue()
    for documented in COMMANDS:
        if documented.text == command and documented.output is not None:
            assert written.getvalue().strip() == documented.output, documented.place


def test_a_command_with_an_environment_is_the_tested_one():
    for command, tested in SAME.items():
        assert command.endswith(tested) and tested in STARTED
        assert re.fullmatch(r"([A-Z_]+=\S+ )+", command.removesuffix(tested)), command


def test_ci_runs_what_is_left_to_it():
    script = (ROOT / ".ci" / "run").read_text()
    for command in BY_CI:
        assert re.search(rf" {command}( ARGS=\S+)?$", script, re.MULTILINE), command
    for documented in (
        "moebius generate --run runs/tiny",
        "moebius eval --run runs/tiny",
        "moebius plot",
        "moebius params",
        "moebius info",
        "deepspeed",
    ):
        assert documented in script


@pytest.mark.parametrize("block", CONFIGS, ids=lambda block: block.place)
def test_a_documented_config_loads(sandbox, inside, block):
    config = load_config(_file_of(block.text), [])
    assert config.name != "tiny"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    for target in links(document):
        path, _, anchor = target.partition("#")
        there = (document.parent / path) if path else document
        assert there.is_file(), f"{document.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{document.name}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_what_is_named_exists(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    scripts = [path for folder in ("launch", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    commands = "".join(path.read_text() for path in scripts)
    for span in spans(document):
        problem = f"{document.name}: `{span}`"
        for target in re.findall(r"\bmake ([a-z-]+)", span):
            assert target in targets, problem
        if span.startswith("moebius ") and span.split()[1].isalpha():
            assert span.split()[1] in cli.COMMANDS, problem
        for flag in re.findall(r"(?:^| )(--[a-z-]+)", span):
            assert f'"{flag}"' in commands or flag in OTHER_FLAGS, problem
        if _is_file(span):
            there = (ROOT / span, document.parent / span)
            assert span in NOT_IN_THE_CHECKOUT or any(path.exists() for path in there), problem
        for key in _keys(span):
            assert key in KEYS | SECTIONS | {"key"}, problem


def test_make_targets_in_blocks_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in COMMANDS:
        for target in re.findall(r"\bmake ([a-z-]+)", command.text):
            assert target in targets, command


def test_the_figures_of_a_record_are_those_explained(sandbox):
    text = prose(ROOT / "docs" / "running.md").partition("## What the figures mean")[2].partition("\n## ")[0]
    explained = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    sandbox.start(TRAIN)
    lines = (sandbox.folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    recorded = {key for line in lines for key in json.loads(line)}
    assert explained == recorded | {"z_loss"}  # which the example does not use


def _is_file(span: str) -> bool:
    if not re.fullmatch(r"[\w.~<>/-]+", span):
        return False
    return "/" in span or span.endswith((".py", ".yaml", ".toml", ".md", ".json", ".jsonl", ".png")) or span == ".venv"


def _keys(span: str) -> list[str]:
    """Config keys in a span: those of an override, and dotted names that begin with a section."""
    overridden = re.findall(r"(?<![\w.-])([a-z][a-z_.0-9]*)=", span)
    dotted = [span] if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", span) and not _is_file(span) else []
    return [*overridden, *(key for key in dotted if key.partition(".")[0] in SECTIONS)]
