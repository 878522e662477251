"""Records reach every sink once, whatever interrupts the run."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest

from backends.errors import UserError
from trainer.config.schema import Config
from trainer.metrics.charts import check_installed, flatten
from trainer.metrics.jsonl import FILE_NAME
from trainer.metrics.recorder import Recorder


def record(step: int, loss: float = 2.5) -> dict:
    return {
        "step": step,
        "loss": loss,
        "lr": 1e-4,
        "tokens_per_second": 12345.0,
        "expert_load": {"3": {"max_over_mean": 1.5, "entropy": 0.9}},
        "times": {"data": 0.25},
    }


def quiet(**metrics) -> Config:
    config = Config()
    config.metrics.tensorboard = False
    for name, value in metrics.items():
        setattr(config.metrics, name, value)
    return config


def run(folder: Path, steps: range, config: Config, start_step: int = 0) -> None:
    with Recorder(str(folder), config, True, 10, start_step, io.StringIO()) as recorder:
        for step in steps:
            recorder.step(record(step, loss=float(100 * start_step + step)))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def test_jsonl_keeps_the_whole_record(tmp_path):
    run(tmp_path, range(1, 3), quiet())
    assert lines(tmp_path) == [record(1, 1.0), record(2, 2.0)]


def test_records_are_on_disk_before_the_run_ends(tmp_path):
    recorder = Recorder(str(tmp_path), quiet(), True, 10, stream=io.StringIO())
    recorder.step(record(1))
    assert len(lines(tmp_path)) == 1
    recorder.close()


def test_resume_leaves_each_step_once(tmp_path):
    with Recorder(str(tmp_path), quiet(), True, 10, stream=io.StringIO()) as recorder:
        recorder.evaluation({"bigram_loss": 5.5})
        for step in range(1, 6):
            recorder.step(record(step))
        recorder.evaluation({"step": 5, "validation_loss": 3.0})
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    run(tmp_path, range(4, 8), quiet(), start_step=3)
    kept = lines(tmp_path)
    assert [line.get("step") for line in kept] == [None, 1, 2, 3, 4, 5, 6, 7]
    assert kept[0] == {"bigram_loss": 5.5}
    assert [line["loss"] for line in kept[1:]] == [2.5, 2.5, 2.5, 304.0, 305.0, 306.0, 307.0]
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_nan_is_valid_json(tmp_path):
    with Recorder(str(tmp_path), quiet(), True, 10, stream=io.StringIO()) as recorder:
        recorder.step({"step": 1, "loss": float("nan"), "times": {"data": float("inf")}})
    text = (tmp_path / FILE_NAME).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "times": {"data": None}}


def test_other_ranks_write_nothing(tmp_path):
    stream = io.StringIO()
    with Recorder(str(tmp_path), Config(), False, 10, stream=stream) as recorder:
        recorder.step(record(1))
        recorder.evaluation({"step": 1, "validation_loss": 3.0})
        recorder.message("hello")
    assert not os.listdir(tmp_path) and not stream.getvalue()


def test_flatten_names():
    assert flatten(record(1), "train") == {
        "train/loss": 2.5,
        "train/lr": 1e-4,
        "train/tokens_per_second": 12345.0,
        "expert_load/3/max_over_mean": 1.5,
        "expert_load/3/entropy": 0.9,
        "times/data": 0.25,
    }


def test_tensorboard_hides_the_steps_after_the_one_resumed_from(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, range(1, 6), Config())
    run(tmp_path, range(4, 7), Config(), start_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1), (2, 2), (3, 3), (4, 304), (5, 305), (6, 306),
    ]  # fmt: skip
    assert "expert_load/3/entropy" in events.Tags()["scalars"]


@pytest.fixture
def one_rank(monkeypatch):
    """DeepSpeed's monitors ask for the rank; a process group only for that would take seconds."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)


def test_csv_after_resume_has_one_header_and_each_step_once(tmp_path, one_rank):
    run(tmp_path, range(1, 6), quiet(csv=True))
    run(tmp_path, range(4, 7), quiet(csv=True), start_step=3)
    with (tmp_path / "csv" / "train_loss.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "loss"]
    assert [(int(step), float(loss)) for step, loss in rows[1:]] == [
        (1, 1), (2, 2), (3, 3), (4, 304), (5, 305), (6, 306),
    ]  # fmt: skip


def test_wandb_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_installed(Config().metrics, "x.yaml")
    with pytest.raises(UserError) as raised:
        check_installed(quiet(wandb=True).metrics, "x.yaml")
    assert str(raised.value) == (
        "x.yaml: metrics.wandb: wandb is not installed; `pip install wandb`, or set metrics.wandb=false"
    )


def test_wandb_that_does_not_start_is_one_line(tmp_path, monkeypatch, one_rank):
    class Wandb:
        __spec__ = None

        @staticmethod
        def init(**settings):
            assert settings["project"] == "moebius"
            raise RuntimeError("no login")

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    with pytest.raises(UserError, match=r"metrics.wandb: .*\(RuntimeError: no login\); run `wandb login`"):
        Recorder(str(tmp_path), quiet(wandb=True, tensorboard=True, csv=True), True, 10)
    assert not os.listdir(tmp_path)


def test_wandb_gets_the_records(tmp_path, monkeypatch, one_rank):
    logged = []

    class Wandb:
        init = staticmethod(lambda **settings: None)
        log = staticmethod(lambda data, step, commit: logged.append((step, data)))
        finish = staticmethod(lambda: logged.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    run(tmp_path, range(1, 2), quiet(wandb=True))
    assert (1, {"train/loss": 1.0}) in logged and logged[-1] == "finished"


def test_the_screen_shows_evaluations_and_the_bigram_loss(tmp_path):
    stream = io.StringIO()
    with Recorder(str(tmp_path), quiet(), True, 10, stream=stream) as recorder:
        recorder.evaluation({"step": 5, "validation_loss": 3.25})
        recorder.evaluation({"bigram_loss": 5.5})
    assert stream.getvalue() == "step 5: validation loss 3.2500\nbigram loss 5.5000\n"
