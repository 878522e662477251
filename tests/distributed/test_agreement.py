"""Ranks that were given different things, or of which one cannot go on: one line, and an exit code on every rank."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import backends
from tests.distributed.ranks import ROOT, end_of_ranks, environment
from tests.small import small_config
from trainer.config.schema import Config
from trainer.data import load_tokenizer, open_data
from trainer.facts import common_facts

SECOND = f"rank 1 on {socket.gethostname()}: "


def end(*arguments: str) -> list[tuple[int, str]]:
    # A rank gives the first 10 seconds to print; under a launcher others may be stopped sooner.
    return end_of_ranks(2, "tests.distributed.disagree", *arguments, timeout=120, grace=30)


def test_ranks_with_the_same_facts_go_on() -> None:
    assert end("the same") == [(0, ""), (0, "")]


@pytest.mark.parametrize(
    ("way", "line"),
    [
        (
            "another value",
            f"{SECOND}train.steps: is 30, but 20 on rank 0; start every rank with the same config and the same "
            "software",
        ),
        ("the second lacks a file", f"{SECOND}data.paths: there is no file there; correct it"),
        ("the first does", "data.paths: there is no file there; correct it"),
        ("every rank lacks a file", "data.paths: there is no file there; correct it"),
        ("the second fails later", f"{SECOND}checkpoint: is damaged; choose another"),
    ],
)
def test_all_end_with_what_one_cannot_do_and_the_first_says_it(way: str, line: str) -> None:
    assert end(way) == [(2, f"moebius: {line}\n"), (2, "")]


def test_a_rank_that_is_not_heard_speaks_itself() -> None:
    line = f"moebius: {SECOND}data.paths: there is no file there; correct it\n"
    # The first, which hears of it later, speaks as well.
    assert end("the first takes long") == [(2, line), (2, line)]


def test_a_bug_on_one_rank_shows_its_traceback_and_ends_those_that_wait() -> None:
    (code, output), (buggy, traceback) = end("the second has a bug")
    assert (code, output, buggy) == (1, "", 1)
    assert traceback.startswith("Traceback") and traceback.endswith("KeyError: 'a bug'\n")


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ranks = environment(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command = [sys.executable, "-m", "tests.distributed.disagree", "the same"]
        ran = subprocess.run(command, cwd=ROOT, env=ranks, capture_output=True, text=True, timeout=120)
    line = ran.stderr.splitlines()[-1]  # torch warns before
    assert (ran.returncode, line.partition(";")[0]) == (
        2,
        f"moebius: port {port} of 127.0.0.1, where the ranks meet, is in use",
    )


def test_training_with_another_config_on_one_rank(small: Path, tmp_path: Path) -> None:
    places = [f"data.paths=[{small.parent}/texts]", f"data.cache_dir={small.parent}/cache", f"run_dir={tmp_path}/run"]
    (code, output), other = end("train", "--config", str(small), *places)
    assert (code, other) == (2, (2, ""))
    said = [line for line in output.splitlines() if line.startswith("moebius: ")]  # what is prepared is told before
    assert len(said) == 1 and said[0].startswith(f"moebius: {SECOND}train.steps: is 21, but 20 on rank 0; ")
    assert not (tmp_path / "run").exists()


def facts(config: Config) -> dict:
    tokenizer = load_tokenizer(config.data, "small.yaml")
    readers = open_data(config.data, tokenizer, config.seed, "small.yaml")
    return common_facts(config, backends.select(config.backend), *readers)


def test_hosts_may_keep_the_same_files_in_other_places(small: Path, tmp_path: Path) -> None:
    here = facts(small_config(small))
    shutil.copytree(small.parent / "texts", tmp_path / "texts")
    there = [f"data.paths=[{tmp_path}/texts]", f"data.cache_dir={tmp_path}/cache", "backend=cpu"]
    assert facts(small_config(small, *there)) == here
    for text in (tmp_path / "texts").iterdir():
        text.write_text(f"{text.read_text()} and more")
    changed = facts(small_config(small, *there, f"data.cache_dir={tmp_path}/fresh"))
    assert {"training data: corpus", "validation data: corpus"} <= {key for key in here if here[key] != changed[key]}
