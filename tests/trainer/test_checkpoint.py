"""What a checkpoint refuses, and that a half-written one is never seen."""

import resource
import shutil
from pathlib import Path

import pytest
import torch

import backends
from backends import UserError
from tests.small import small_config
from trainer import checkpoint
from trainer.checkpoint import manifest
from trainer.loop import Loop
from trainer.setup import Run, prepare

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def trained(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    run_dir = tmp_path_factory.mktemp("checkpoints") / "run"
    config = small_config(small, f"run_dir={run_dir}", "train.steps=6", "checkpoint.every=3")
    run = prepare(config, str(small), False)
    Loop(run).train()
    return run_dir, run


def saver(run: Run) -> checkpoint.Saver:
    return checkpoint.Saver(run.run_dir, run.model, run.engine, run.config, run.tokenizer)


def resume(small: Path, run_dir: Path, *overrides: str) -> Run:
    return prepare(small_config(small, f"run_dir={run_dir}", "train.steps=6", *overrides), str(small), True)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.hidden_size=64", "model.hidden_size"),
        ("model.moe.num_experts=16", "model.moe.num_experts"),
        ("model.rope.theta=5000", "model.rope.theta"),
        ("model.moe.top_k=1", "model.moe.top_k"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    small: Path, trained: tuple[Path, Run], override: str, key: str
) -> None:
    with pytest.raises(UserError, match=rf"{key}: is .*of a model with .*; use the config"):
        resume(small, trained[0], override)


def test_loss_weights_may_change_on_resume(small: Path, trained: tuple[Path, Run]) -> None:
    assert resume(small, trained[0], "model.moe.aux_loss=0.5", "optimizer.lr=0.1").step == 6


@pytest.mark.parametrize("damage", ["cut", "missing", "metadata", "state"])
def test_a_damaged_checkpoint_is_refused_by_name(
    small: Path, trained: tuple[Path, Run], tmp_path: Path, damage: str
) -> None:
    shutil.copytree(trained[0], tmp_path / "a")
    newest = checkpoint.newest(tmp_path / "a")
    assert newest is not None
    files = sorted(newest.glob("*.distcp"))
    if damage == "cut":
        files[0].write_bytes(files[0].read_bytes()[: files[0].stat().st_size // 2])
    elif damage == "missing":
        files[0].unlink()
    elif damage == "metadata":
        (newest / ".metadata").write_bytes(b"nonsense")
    else:
        (newest / "trainer.json").write_text("{")
    with pytest.raises(
        UserError, match=r"step-000006.* \(.+\); delete this folder, and the checkpoint before it is the newest"
    ):
        resume(small, tmp_path / "a")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_is_one_line_and_leaves_the_previous_one_newest(
    small: Path, trained: tuple[Path, Run], tmp_path: Path, asynchronous: bool
) -> None:
    shutil.copytree(trained[0], tmp_path / "a")
    run = resume(small, tmp_path / "a", f"checkpoint.asynchronous={asynchronous}")
    with saver(run) as made:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # what a full disk or a quota does
        try:
            with pytest.raises(UserError, match=r"checkpoint of step 7 \(File too large\); mend that and go on"):
                made.save(7, {})
                made.save(8, {})  # hears of it
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        newest = checkpoint.newest(tmp_path / "a")
        assert newest is not None and newest.name == "step-000006"
        made.save(9, {})  # and the next one is as good as any
    newest = checkpoint.newest(tmp_path / "a")
    assert newest is not None and newest.name == "step-000009" and not manifest.damages(newest)


def test_inference_loads_the_trained_weights(trained: tuple[Path, Run]) -> None:
    run_dir, run = trained
    backend = backends.select("cpu")
    model, tokenizer, _ = checkpoint.load_for_inference(str(run_dir), backend)
    expected = dict(run.model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())
    buffers = dict(run.model.named_buffers())
    assert any(value.any() for value in buffers.values())  # the expert bias has moved
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert tokenizer.fingerprint == run.tokenizer.fingerprint


def test_inference_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load_for_inference(str(tmp_path), backends.select("cpu"))
