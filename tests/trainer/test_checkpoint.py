"""What a checkpoint refuses, and that a half-written one is never seen."""

import re
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import backends
from backends import UserError
from launch.cli import main
from tests.small import small_config
from trainer import checkpoint
from trainer.checkpoint import folder, manifest
from trainer.checkpoint import saver as saving
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


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut", r"__0_0.distcp: is damaged \([\d,]+ bytes instead of [\d,]+"),
        ("missing", r"__0_0.distcp: is damaged \(No such file or directory"),
        ("metadata", r".metadata: is damaged \(8 bytes instead of [\d,]+"),
        ("state", r"trainer.json: is damaged \(1 bytes instead of [\d,]+"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    small: Path, trained: tuple[Path, Run], tmp_path: Path, damage: str, said: str
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
        UserError,
        match=rf"step-000006/{said}\); delete this folder, and the checkpoint before it is the newest; "
        r"or go on from that one: --resume .*/a/checkpoints/step-000003$",
    ):
        resume(small, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-000003")
    with pytest.raises(UserError, match=r"; there is none before it here: start anew with another name=\.\.\.$"):
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


def test_training_goes_on_while_a_checkpoint_is_written(
    small: Path, trained: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held up until the weights have changed: what is written are those of before."""
    shutil.copytree(trained[0], tmp_path / "a")
    run = resume(small, tmp_path / "a")
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    go_on, real = threading.Event(), saving.write_part
    state = {"tokens": 1, "data": run.training.state_dict()}

    def held_up(*arguments: Any) -> None:
        assert go_on.wait(60) and threading.current_thread() is not threading.main_thread()
        real(*arguments)

    monkeypatch.setattr(saving, "write_part", held_up)
    with saver(run) as made:
        made.save(7, state)
        state["tokens"] = 2
        for shard in run.engine.shards():
            shard.state["weight"].add_(1.0)
        newest = checkpoint.newest(tmp_path / "a")
        assert newest is not None and newest.name == "step-000006"
        go_on.set()
    again = resume(small, tmp_path / "a")
    assert (again.step, again.tokens) == (7, 1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in again.model.named_parameters())


def test_a_job_that_fails_does_not_wait_for_parts_that_never_come(
    small: Path, trained: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained[0], tmp_path / "a")
    run = resume(small, tmp_path / "a")
    monkeypatch.setattr(saving, "missing_parts", lambda *_: [1])  # of a rank that was killed
    with pytest.raises(RuntimeError, match="lost"), saver(run) as made:
        made.save(7, {})
        raise RuntimeError("lost")
    newest = checkpoint.newest(tmp_path / "a")
    assert newest is not None and newest.name == "step-000006"
    assert [path.name for path in folder.unfinished(tmp_path / "a")] == [".step-000007.partial"]


def test_a_checkpoint_from_before_a_resume_is_never_the_newest(
    small: Path, trained: tuple[Path, Run], tmp_path: Path
) -> None:
    shutil.copytree(trained[0], tmp_path / "a")
    run = resume(small, tmp_path / "a")
    with saver(run) as made:
        for step in (5, 6):  # step 6 of the run before is there
            made.save(step, {})
            made.wait()
            newest = checkpoint.newest(tmp_path / "a")
            assert newest is not None and checkpoint.step_of(newest) == step
    assert [path.name for path in folder.superseded(tmp_path / "a")] == ["superseded-step-000006"]


@pytest.mark.parametrize(
    ("keep", "keep_every", "stay"), [(2, 0, [7, 8]), (1, 3, [3, 6, 8]), (0, 0, list(range(1, 9))), (2, 8, [7, 8])]
)
def test_the_newest_and_some_for_ever_are_kept(tmp_path: Path, keep: int, keep_every: int, stay: list[int]) -> None:
    for step in range(1, 9):
        folder.begin(tmp_path, step)
        folder.publish(tmp_path, step)
        folder.thin_out(tmp_path, keep, keep_every)
    assert [checkpoint.step_of(path) for path in folder.complete(tmp_path)] == stay
    assert not folder.unfinished(tmp_path)


def test_what_killed_saves_left_is_never_the_newest_and_goes(tmp_path: Path) -> None:
    folder.begin(tmp_path, 3)
    folder.publish(tmp_path, 3)
    folder.begin(tmp_path, 9)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step-000003"
    folder.begin(tmp_path, 6)
    assert [path.name for path in folder.unfinished(tmp_path)] == [".step-000006.partial"]


def test_every_damaged_file_is_named(
    trained: tuple[Path, Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained[0], tmp_path / "a")
    newest = checkpoint.newest(tmp_path / "a")
    assert newest is not None
    assert main(["checkpoints", str(tmp_path / "a"), "--verify"]) == 0
    rows = capfd.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["step", "3", "6"]
    assert all("small, " in row and "1 process" in row and row.rstrip().endswith("verified") for row in rows[1:])
    files = sorted(path.name for path in newest.iterdir())
    assert files == [".metadata", "__0_0.distcp", "config.yaml", "manifest.json", "tokenizer.json", "trainer.json"]
    for name in files:
        whole = (newest / name).read_bytes()
        for damaged in (whole[:-1], b"{" + whole[1:-1] + b"~", None):
            if damaged is None:
                (newest / name).unlink()
            else:
                (newest / name).write_bytes(damaged)
            assert list(manifest.damages(newest)) == [name]
            (newest / name).write_bytes(whole)
    data = newest / "__0_0.distcp"
    data.write_bytes(whole_but_one_bit(data.read_bytes()))
    assert main(["checkpoints", str(tmp_path / "a")]) == 0  # the size is right
    assert main(["checkpoints", str(tmp_path / "a"), "--verify"]) == 1
    out = capfd.readouterr().out
    assert f"{data}: its checksum is another" in out and re.search(r"^6 .*damaged *$", out, re.MULTILINE)
    assert re.search(r"^3 .*verified *$", out, re.MULTILINE)


def whole_but_one_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_saves_under_way_are_listed_as_not_complete(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder.begin(tmp_path, 9)
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert re.search(r"^9 .*not complete *$", capfd.readouterr().out, re.MULTILINE)
    (tmp_path / "empty").mkdir()
    for name, problem in (("empty", "holds no checkpoint"), ("nothing", "there is no such folder")):
        assert main(["checkpoints", str(tmp_path / name)]) == 2
        assert problem in capfd.readouterr().err


def test_a_supervised_run_starts_or_goes_on(trained: tuple[Path, Run], tmp_path: Path) -> None:
    def start(where: Path) -> Path | None:
        return checkpoint.starting_point(where, resume=True, may_start=True)

    assert start(tmp_path / "nothing") is None
    (tmp_path / "killed").mkdir()
    assert start(tmp_path / "killed") is None
    (tmp_path / "killed" / "config.yaml").touch()  # killed before its first checkpoint
    assert start(tmp_path / "killed") is None
    assert start(trained[0]) == checkpoint.newest(trained[0])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="this run directory exists; choose another"):
        start(tmp_path / "other")


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
