"""The loop in one process: resume, stop, accumulation, precision, refusals."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from backends import UserError
from tests.small import small_config
from trainer import checkpoint
from trainer.loop import Loop
from trainer.setup import Run, prepare

pytestmark = pytest.mark.usefixtures("alone")


def train(small: Path, run_dir: Path, *overrides: str, resume: bool | str = False) -> Run:
    config = small_config(small, f"run_dir={run_dir}", *overrides)
    run = prepare(config, str(small), resume)
    Loop(run).train()
    return run


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The run directory and final weights of an uninterrupted run of 20 steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, weights(train(small, run_dir))


def test_it_learns(whole: tuple[Path, dict]) -> None:
    values = losses(whole[0])
    assert len(values) == 20
    assert values[-1] < 0.8 * values[0]


def test_a_record_has_every_metric(whole: tuple[Path, dict]) -> None:
    record = json.loads((whole[0] / "metrics.jsonl").read_text().splitlines()[5])
    assert {"step", "loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens"} <= record.keys()
    assert {"tokens_per_second", "tflops", "mfu", "seconds_left", "memory_gib"} <= record.keys()
    assert record["times"].keys() == {"data", "forward_backward", "reduce", "optimizer"}
    assert record["expert_load"].keys() == {"1", "2", "3"}  # layer 0 is dense, 3 belongs to MTP
    assert record["tokens"] == record["step"] * 256
    assert record["loss"] == pytest.approx(
        record["lm_loss"] + 0.3 * record["mtp_loss"] + record["aux_loss"] + record["z_loss"]
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(small: Path, tmp_path: Path, precision: str) -> None:
    before = weights(train(small, tmp_path / "a", f"train.precision={precision}"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000020")
    run = train(small, tmp_path / "b", f"train.precision={precision}", resume=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert all(torch.equal(before[name], value) for name, value in weights(run).items())
    assert next(run.model.parameters()).dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(
    small: Path, tmp_path: Path, whole: tuple[Path, dict], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(small, f"run_dir={tmp_path}/a")
    run = prepare(config, str(small), False)
    loop = Loop(run)
    real = run.model.part
    sent = []

    def signalled(*arguments):
        if run.step == 4 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)  # in the middle of step 5
        return real(*arguments)

    monkeypatch.setattr(run.model, "part", signalled)
    assert loop.train() is False
    newest = checkpoint.newest(tmp_path / "a")
    assert newest is not None and checkpoint.step_of(newest) == 5
    again = train(small, tmp_path / "a", resume=True)
    assert losses(tmp_path / "a") == losses(whole[0])
    assert all(torch.equal(whole[1][name], value) for name, value in weights(again).items())


def test_the_old_signal_handlers_come_back(small: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train(small, tmp_path / "a", "train.steps=3", "schedule.warmup_steps=1")
    assert signal.getsignal(signal.SIGTERM) is before


def test_bf16_follows_fp32(small: Path, tmp_path: Path, whole: tuple[Path, dict]) -> None:
    train(small, tmp_path / "a", "train.precision=bf16")
    # bf16 keeps 8 bits: single activations are off by up to 0.4 %, their mean over 256 tokens by much less.
    assert losses(tmp_path / "a") == pytest.approx(losses(whole[0]), rel=2e-2)


def test_one_micro_batch_or_many(small: Path, tmp_path: Path, whole: tuple[Path, dict]) -> None:
    # fp32 sums in another order: the mission's bound.
    for size in (1, 8):
        train(small, tmp_path / str(size), f"train.micro_batch_size={size}")
        assert losses(tmp_path / str(size)) == pytest.approx(losses(whole[0]), rel=1e-5)


def test_recomputed_activations_change_no_bit(small: Path, tmp_path: Path, whole: tuple[Path, dict]) -> None:
    train(small, tmp_path / "a", "train.activation_checkpointing=layer")
    assert losses(tmp_path / "a") == losses(whole[0])


def test_the_seed_decides(small: Path, tmp_path: Path, whole: tuple[Path, dict]) -> None:
    train(small, tmp_path / "a", "seed=1", "train.steps=3", "schedule.warmup_steps=1")
    assert losses(tmp_path / "a")[0] != losses(whole[0])[0]


def test_evaluation_leaves_training_alone(small: Path, tmp_path: Path, whole: tuple[Path, dict]) -> None:
    train(small, tmp_path / "a", "train.eval_every=1", "train.eval_sequences=0")
    assert losses(tmp_path / "a") == losses(whole[0])


def test_evaluation_is_the_mean_over_held_out_tokens(small: Path, tmp_path: Path) -> None:
    run = prepare(small_config(small, f"run_dir={tmp_path}/a", "train.eval_sequences=5"), str(small), False)
    found = Loop(run).evaluate()
    run.validation.restart()
    batch = run.validation.read(5, range(5))
    with torch.no_grad():
        run.model(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.labels_BS)
    sums, _ = run.model.meters.take()
    # Micro-batches of 2, 2 and 1 against one of 5: fp32 sums in another order.
    assert found == pytest.approx(float(sums["lm_loss"]), rel=1e-6)


def test_only_the_newest_checkpoints_are_kept(whole: tuple[Path, dict]) -> None:
    assert sorted(path.name for path in (whole[0] / "checkpoints").iterdir()) == ["step-000014", "step-000020"]


def test_a_gradient_that_is_not_finite_is_skipped_and_then_refused(small: Path, tmp_path: Path) -> None:
    run = prepare(small_config(small, f"run_dir={tmp_path}/a"), str(small), False)
    loop = Loop(run)
    before = weights(run)
    real = run.model.part
    run.model.part = lambda *arguments: real(*arguments) * math.nan  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"optimizer\.lr.*not finite in 5 steps in a row.*lower it"):
        loop.train()
    assert all(torch.equal(before[name], value) for name, value in weights(run).items())
    assert not any(moe.router.expert_bias.any() for _, moe in run.model.moe_layers())


def test_an_existing_run_directory_is_not_touched(small: Path, tmp_path: Path, whole: tuple[Path, dict]) -> None:
    shutil.copytree(whole[0], tmp_path / "a")
    stamp = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    with pytest.raises(UserError, match=r"a: this run directory exists; add --resume"):
        train(small, tmp_path / "a")
    assert stamp == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}


def test_resume_needs_a_checkpoint(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint to resume from; start without --resume"):
        train(small, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_resume_from_a_checkpoint_by_name(small: Path, tmp_path: Path, whole: tuple[Path, dict]) -> None:
    shutil.copytree(whole[0], tmp_path / "a")
    earlier = tmp_path / "a" / "checkpoints" / "step-000014"
    prepared = prepare(small_config(small, f"run_dir={tmp_path}/a"), str(small), os.path.relpath(earlier))
    assert prepared.step == 14
    run = train(small, tmp_path / "a", resume=f"{earlier}/")
    assert losses(tmp_path / "a") == losses(whole[0])
    assert all(torch.equal(whole[1][name], value) for name, value in weights(run).items())


def test_resume_from_what_is_no_checkpoint_of_the_run(small: Path, tmp_path: Path, whole: tuple[Path, dict]) -> None:
    shutil.copytree(whole[0], tmp_path / "a")
    for other in (whole[0] / "checkpoints" / "step-000014", tmp_path / "a", tmp_path / "a/checkpoints/step-000015"):
        with pytest.raises(UserError) as raised:
            train(small, tmp_path / "a", resume=str(other))
        assert str(raised.value) == (
            f"--resume: {other} is no checkpoint of {tmp_path}/a; give one of those in {tmp_path}/a/checkpoints "
            "(step-000014, step-000020)"
        )
    with pytest.raises(UserError, match="is no checkpoint of .*/none; start without --resume"):
        train(small, tmp_path / "none", resume=str(tmp_path))


def test_nothing_is_left_behind_by_a_refused_run(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab"):
        train(small, tmp_path / "a", "model.vocab_size=280")
    with pytest.raises(UserError, match="backend"):
        train(small, tmp_path / "a", "backend=ascend")
    assert not (tmp_path / "a").exists()


def test_a_run_directory_that_cannot_be_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"run_dir: .*/file/run: .*/file is a file; choose another"):
        train(small, tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"run_dir: /proc/nope/run: (cannot be written|/proc may not be written to)"):
        train(small, Path("/proc/nope/run"))
