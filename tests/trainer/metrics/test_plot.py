"""The picture is drawn from what the jsonl holds."""

import io
import sys

import pytest

from backends.errors import UserError
from trainer.config.schema import Config
from trainer.metrics.jsonl import FILE_NAME
from trainer.metrics.plot import curves, plot_losses
from trainer.metrics.recorder import Recorder


@pytest.fixture
def run_dir(tmp_path):
    config = Config()
    config.metrics.tensorboard = False
    with Recorder(str(tmp_path), config, True, 10, stream=io.StringIO()) as recorder:
        recorder.evaluation({"bigram_loss": 5.51})
        for step in range(1, 11):
            recorder.step({"step": step, "loss": 8.5 - step / 2, "lm_loss": 8.0 - step / 2})
        recorder.evaluation({"step": 5, "validation_loss": 6.0})
        recorder.evaluation({"step": 10, "validation_loss": 3.25})
    return tmp_path


def test_curves_and_baseline(run_dir):
    out = run_dir / "loss.svg"
    plot_losses(str(run_dir), str(out), "tiny")
    # An SVG of ours keeps text as text, so that we see what was drawn.
    text = out.read_text()
    for label in ("training", "validation (3.25)", "bigram model (5.51)", "tiny", "loss (nats per token)"):
        assert f">{label}</text>" in text


def test_curves_show_what_validation_measures(run_dir):
    train, validation, bigram = curves(str(run_dir))
    assert train[0] == (1, 7.5) and train[-1] == (10, 3.0) and len(train) == 10
    assert (validation, bigram) == ([(5, 6.0), (10, 3.25)], 5.51)


def test_the_whole_loss_stands_in_where_there_is_no_other(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n')
    assert curves(str(tmp_path)) == ([(1, 2.0)], [], None)


def test_png(run_dir):
    plot_losses(str(run_dir), str(run_dir / "loss.png"))
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def refusal(run_dir, out) -> str:
    with pytest.raises(UserError) as raised:
        plot_losses(str(run_dir), str(out))
    return str(raised.value)


def test_refusals(run_dir, tmp_path, monkeypatch):
    assert refusal(tmp_path / "no", "x.png").endswith(
        "no/metrics.jsonl: there is no such file; give the directory of a run that has started"
    )
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / FILE_NAME).write_text('{"bigram_loss": 5.5}\n')
    assert refusal(tmp_path / "fresh", "x.png").endswith("holds no losses yet; wait for the first step")
    assert "give a writable .png, .svg or .pdf file" in refusal(run_dir, tmp_path / "no" / "x.png")
    assert "give a writable .png, .svg or .pdf file" in refusal(run_dir, tmp_path / "x.mp4")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert refusal(run_dir, "x.png") == "matplotlib is not installed; `pip install matplotlib`"
