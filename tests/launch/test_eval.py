"""`moebius eval`: the loss that training printed, and other texts."""

import json
import math
from pathlib import Path

import pytest

from launch import cli
from tests.small import small_config
from trainer.data.tokenizer import saved_tokenizer
from trainer.loop import Loop
from trainer.setup import prepare

pytestmark = pytest.mark.usefixtures("alone")


def evaluated(capfd, *arguments: str) -> dict:
    """What `moebius eval --json` prints."""
    capfd.readouterr()
    code = cli.main(["eval", "--json", *arguments])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out)


def refused(capfd, *arguments: str) -> str:
    """The one line that says why."""
    capfd.readouterr()
    assert cli.main(["eval", *arguments]) == 2
    out, err = capfd.readouterr()
    *before, line = err.splitlines()
    assert out == "" and before in ([], ["tokenizing the given documents ..."]) and line.startswith("moebius: ")
    return line


@pytest.fixture(scope="module")
def run_dir(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with an evaluation of five sequences at its end: the last micro-batch is padded."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    changes = ["train.steps=3", "schedule.warmup_steps=1", "checkpoint.every=2", "train.eval_sequences=5"]
    config = small_config(small, f"run_dir={folder}", *changes)
    Loop(prepare(config, str(small), False)).train()
    return folder


@pytest.fixture(scope="module")
def trained_loss(run_dir: Path) -> float:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    (loss,) = (line["validation_loss"] for line in lines if "validation_loss" in line)
    return loss


def test_the_loss_is_the_one_that_training_printed(capfd, run_dir, trained_loss):
    found = evaluated(capfd, "--run", str(run_dir))
    # The same code, weights and micro-batches in one process: not a bit is different.
    assert found["loss"] == trained_loss
    assert (found["checkpoint"], found["sequences"]) == ("step-000003", 5)
    assert found["perplexity"] == math.exp(trained_loss)


def test_so_it_is_in_bf16(capfd, small, tmp_path):
    changes = ["train.steps=1", "schedule.warmup_steps=1", "train.precision=bf16"]
    run = prepare(small_config(small, f"run_dir={tmp_path}/a", *changes), str(small), False)
    Loop(run).train()
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert evaluated(capfd, "--run", f"{tmp_path}/a")["loss"] == lines[-1]["validation_loss"]


def test_an_earlier_checkpoint_has_another_loss(capfd, run_dir, trained_loss):
    found = evaluated(capfd, "--checkpoint", str(run_dir / "checkpoints" / "step-000002"))
    assert found["checkpoint"] == "step-000002" and found["loss"] != trained_loss


def test_more_sequences_and_other_micro_batches(capfd, run_dir, trained_loss):
    single = evaluated(capfd, "--run", str(run_dir), "train.micro_batch_size=1")
    assert single["loss"] == pytest.approx(trained_loss, rel=1e-6)  # fp32 sums in another order
    whole = evaluated(capfd, "--run", str(run_dir), "train.eval_sequences=0")
    assert whole["sequences"] > 5 and whole["tokens"] > single["tokens"]


def test_all_of_another_text(capfd, run_dir, tmp_path):
    """Counted by hand: documents are closed by a token, and the first token of each is not predicted."""
    texts = {"a.txt": "a rank of experts\n" * 20, "b.txt": "Möbius 莫比乌斯 " * 30, "c.txt": "loss " * 50}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    other = ["data.source=text", f"data.paths=[{tmp_path}]", "data.streaming=true"]
    found = evaluated(capfd, "--run", str(run_dir), *other)
    tokenizer = saved_tokenizer(run_dir / "checkpoints" / "step-000003" / "tokenizer.json", "<|endoftext|>")
    tokens, firsts = [], set()
    for text in texts.values():
        firsts.add(len(tokens))
        tokens += [*tokenizer.encode(text), tokenizer.end_of_document]
    sequences = (len(tokens) - 1) // 32
    predicted = [place for place in range(1, sequences * 32 + 1) if place not in firsts]
    lengths_V = tokenizer.byte_lengths()
    assert (found["sequences"], found["tokens"]) == (sequences, len(predicted))
    assert found["bytes"] == sum(int(lengths_V[tokens[place]]) for place in predicted)
    total = found["loss"] * found["tokens"]
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / found["bytes"], rel=1e-14)
    packed = evaluated(capfd, "--run", str(run_dir), *other[:2])
    assert packed == found
    assert evaluated(capfd, "--run", str(run_dir), *other, "data.sequence_length=24")["tokens"] != found["tokens"]
    half = evaluated(capfd, "--run", str(run_dir), *other, "data.validation_fraction=0.5")
    assert 0 < half["tokens"] < found["tokens"]


def test_the_table(capfd, run_dir, trained_loss):
    capfd.readouterr()
    assert cli.main(["eval", "--run", str(run_dir)]) == 0
    head, row = capfd.readouterr().out.splitlines()
    assert head.split() == ["checkpoint", "sequences", "tokens", "loss", "perplexity", "bits", "per", "byte"]
    assert row.split()[:2] == ["step-000003", "5"] and row.split()[3] == f"{trained_loss:.4f}"


def test_what_cannot_be_evaluated_is_said_in_a_line(capfd, run_dir, tmp_path):
    run = ["--run", str(run_dir)]
    assert "command line: optimizer.lr: is no key of an evaluation; use data.source, " in refused(
        capfd, *run, "optimizer.lr=1"
    )
    assert "data.tokenizer.path: is no key" in refused(capfd, *run, "data.tokenizer.path=x")
    assert "'data.paths' is not an override; write key=value" in refused(capfd, *run, "data.paths")
    assert f"{tmp_path}/none: there is no such folder" in refused(capfd, "--run", f"{tmp_path}/none")
    assert "holds no checkpoint" in refused(capfd, "--run", str(tmp_path))
    text = ["data.source=text", f"data.paths=[{tmp_path}/none.txt]"]
    assert refused(capfd, *run, *text).startswith("moebius: command line: data.paths: ")
    (tmp_path / "short.txt").write_text("a")
    short = refused(capfd, *run, "data.source=text", f"data.paths=[{tmp_path}/short.txt]")
    assert "the 2 given tokens do not fill one sequence of 32 tokens" in short
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    empty = refused(capfd, *run, "data.source=jsonl", f"data.paths=[{tmp_path}/empty.jsonl]")
    assert "data.paths: hold no document; give files with text in them" in empty
