"""What is said before the first step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.banner import banner
from tests.small import small_config
from trainer.model.count import count_parameters
from trainer.setup import prepare

pytestmark = pytest.mark.usefixtures("alone")


def said(small: Path, run_dir: Path, *overrides: str) -> dict[str, str]:
    """The banner of a run that has not begun, by its first words."""
    run = prepare(small_config(small, f"run_dir={run_dir}", *overrides), str(small), False)
    text = banner(run)
    counts = count_parameters(run.model).values()
    total, active = sum(count.total for count in counts), sum(count.active for count in counts)
    assert text.splitlines()[0] == f"model   {total / 1000:.1f}k parameters, {active / 1000:.1f}k active per token"
    assert all(line[6:8] == "  " and line[8] != " " for line in text.splitlines())
    return {line.split()[0]: line[8:] for line in text.splitlines()}


def test_it_says_what_is_trained_on_what_and_where(small: Path, tmp_path: Path) -> None:
    lines = said(small, tmp_path / "a")
    assert list(lines) == ["model", "device", "layout", "data", "batch", "run"]
    threads = torch.get_num_threads()
    assert lines["device"].startswith("cpu: ")
    assert lines["device"].endswith(f", {threads} thread{'s' * (threads > 1)}, fp32")
    assert lines["layout"] == "1 process"
    documents, _, rest = lines["data"].removeprefix("text: ").partition(" documents, ")
    held_out = rest.partition("held out ")[2].partition(" documents")[0]
    assert int(documents) + int(held_out) == 60 and rest.endswith("; tokenizer of 300 entries")
    assert lines["batch"].startswith("8 sequences of 32 tokens a step; 20 steps, 5.12k tokens, ")
    assert lines["batch"].endswith(" epochs")
    assert lines["run"] == f"{tmp_path}/a"


def test_a_stream_has_no_size(small: Path, tmp_path: Path) -> None:
    lines = said(small, tmp_path / "a", "data.streaming=true", "train.steps=1", "train.precision=bf16")
    assert lines["data"] == "text, streamed; tokenizer of 300 entries"
    assert lines["batch"] == "8 sequences of 32 tokens a step; 1 step, 256 tokens"
    assert lines["device"].endswith(", bf16")


def test_several_processes_say_how_they_share_the_work(small: Path, tmp_path: Path) -> None:
    run = prepare(small_config(small, f"run_dir={tmp_path}/a"), str(small), False)
    edp, ep = replace(run.topology.edp, size=2), replace(run.topology.ep, size=4)
    run.topology = replace(run.topology, world_size=8, edp=edp, ep=ep)
    assert banner(run).splitlines()[2] == "layout  8 processes: 1 pipeline x 2 data x 4 expert"


def test_a_resumed_run_says_where_it_goes_on(small: Path, tmp_path: Path) -> None:
    run = prepare(small_config(small, f"run_dir={tmp_path}/a"), str(small), False)
    del run.model  # the rank's share of it would not tell the size
    run.step = 7
    assert banner(run).splitlines()[-1] == f"run     {tmp_path}/a, from step 7 on"
    run.step = 20
    assert banner(run).endswith("from step 20: nothing is left to train; raise train.steps to go on")
