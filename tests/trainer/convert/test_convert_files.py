"""What an import and an export refuse, what they leave behind, and what a checkpoint that was imported is good for."""

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends import UserError
from launch.cli import main
from tests.published import SHAPES, model_of, publish, tensors_of
from tests.small import small_config
from trainer.checkpoint import ranges
from trainer.config.load import load_config
from trainer.convert import export_weights, import_weights, importing
from trainer.loop import Loop
from trainer.setup import prepare


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("published") / "theirs", "deepseek_v3", SHAPES["deepseek_v3"])


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("imported") / "weights"
    import_weights(source, target)
    return target


def _edit(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Change the file that holds a tensor."""

    def damage(folder: Path) -> None:
        for path in sorted(folder.glob("*.safetensors")):
            tensors = load_file(path)
            if name in tensors:
                change(tensors)
                path.unlink()  # the tensors are views of it
                save_file(tensors, path)

    return damage


EMBED, COPY = "model.embed_tokens.weight", "model.layers.3.embed_tokens.weight"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config.json: cannot be read \(No such file"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), r"config.json: cannot be read \("),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), r"config.json: holds no object"),
    "family": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
        r"config.json: model_type: is 'llama'; supported are deepseek_v3, kimi_k2, ",
    ),
    "dense TeleChat3": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "telechat3", "vocab_size": 9}'),
        r"config.json: hidden_size: is missing",
    ),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        r"theirs: has neither model.safetensors nor model.safetensors.index.json; save it with safetensors first",
    ),
    "index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        r"model.safetensors.index.json: has no weight_map",
    ),
    "no file": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        r"model-00002-of-00003.safetensors: is missing; fetch it again",
    ),
    "cut": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").open("r+b").truncate(20_000),
        r"model-00002-of-00003.safetensors: is damaged \(",
    ),
    "missing": (
        _edit(EXPERT, lambda tensors: tensors.pop(EXPERT)),
        rf"theirs: tensor {EXPERT} \[7, 12\] is missing; fetch the files again",
    ),
    "extra": (
        _edit(EXPERT, lambda tensors: tensors.update({"model.layers.9.norm.weight": torch.ones(12)})),
        r"model-0000\d-of-00003.safetensors: tensor model.layers.9.norm.weight \[12\] is not part of the model",
    ),
    "shape": (
        _edit(EXPERT, lambda tensors: tensors.update({EXPERT: torch.ones(12, 7)})),
        rf"model-0000\d-of-00003.safetensors: tensor {EXPERT} is \[12, 7\], config.json says \[7, 12\]",
    ),
    "twice": (
        lambda folder: shutil.copy(
            folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
        ),
        r"model-00002-of-00003.safetensors: .* is in model-00001-of-00003.safetensors as well",
    ),
    "integers": (
        _edit(EXPERT, lambda tensors: tensors.update({EXPERT: torch.ones(7, 12, dtype=torch.int8)})),
        rf"{EXPERT}: is I8; convert it to bf16 first",
    ),
    "fp8": (
        _edit(EXPERT, lambda tensors: tensors.update({f"{EXPERT}_scale_inv": torch.ones(1, 1)})),
        rf"{EXPERT}_scale_inv: belongs to quantised weights; convert them to bf16 first",
    ),
    "mxfp4": (
        _edit(EXPERT, lambda tensors: tensors.update({"mlp.experts.gate_up_proj_blocks": torch.ones(1)})),
        r"mlp.experts.gate_up_proj_blocks: belongs to quantised weights; convert them to bf16 first",
    ),
    "other embedding": (
        _edit(COPY, lambda tensors: tensors[COPY][-1, -1].add_(1)),
        rf"model-0000\d-of-00003.safetensors: tensor {COPY} is not equal to {EMBED}, but our models have one weight",
    ),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer.json: is no tokenizer that"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(source, tmp_path / "theirs")
    do, said = DAMAGES[damage]
    do(folder)
    assert main(["import", "--from", str(folder), "--to", str(tmp_path / "weights")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(rf"^moebius: {tmp_path}/theirs.*", line) and re.search(said, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_is_ours_already_is_not_imported(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a checkpoint or run directory of moebius already"):
        import_weights(imported, tmp_path / "weights")


def test_nothing_is_written_over(source: Path, imported: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"there: exists; choose another folder"):
        import_weights(source, tmp_path / "there")
    with pytest.raises(UserError, match=r"there: exists; choose another folder"):
        export_weights(str(imported), tmp_path / "there", None, None, 10**9)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        import_weights(source, tmp_path / "file" / "weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "bailing_moe"])
def test_tensors_are_moved_in_blocks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 elements here; rows are longer than that in places, and shorter in others."""
    monkeypatch.setattr(importing, "BLOCK", 50)
    monkeypatch.setattr(ranges, "BLOCK", 30)
    source = publish(tmp_path / "theirs", name, SHAPES[name])
    import_weights(source, tmp_path / "imported")
    export_weights(str(tmp_path / "imported"), tmp_path / "ours", None, None, 10**9)
    before, after = tensors_of(source), tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_full_disk_is_one_line(source: Path, imported: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))  # what a full disk or a quota does
    try:
        with pytest.raises(UserError, match=r"weights: cannot be written \(File too large\); choose another folder"):
            import_weights(source, tmp_path / "weights")
        with pytest.raises(UserError, match=r"ours: cannot be written \(.*File too large.*\); choose another folder"):
            export_weights(str(imported), tmp_path / "ours", None, None, 10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_file_may_say_what_ours_has_not(source: Path, tmp_path: Path) -> None:
    """Frequencies, which old files hold, are computed here; copies of the embedding need not be there."""
    folder = shutil.copytree(source, tmp_path / "theirs")
    _edit(COPY, lambda tensors: tensors.pop(COPY))(folder)
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _edit(EXPERT, lambda tensors: tensors.update({frequencies: torch.ones(2)}))(folder)
    import_weights(folder, tmp_path / "imported")
    export_weights(str(tmp_path / "imported"), tmp_path / "ours", None, None, 10**9)
    before, after = tensors_of(source), tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in (tmp_path / "ours").glob("*.safetensors*")] == ["model.safetensors"]


def test_a_damaged_checkpoint_is_not_exported(imported: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(imported, tmp_path / "copied")
    (copied / "__1_0.distcp").open("r+b").truncate(1000)
    with pytest.raises(UserError, match=r"copied/__1_0.distcp: is damaged \(1,000 bytes instead of"):
        export_weights(str(copied), tmp_path / "ours", None, None, 10**9)
    with pytest.raises(UserError, match="copied/published: holds no checkpoint"):
        export_weights(str(copied / "published"), tmp_path / "ours", None, None, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_an_export_can_be_told_the_family_and_the_dtype(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.yaml: model.attention.kind: is mla; qwen3_moe models have gqa"):
        export_weights(str(imported), tmp_path / "ours", None, "qwen3_moe", 10**9)
    export_weights(str(imported), tmp_path / "ours", "bf16", "deepseek_v3", 10**9)
    dtypes = {name: value.dtype for name, value in tensors_of(tmp_path / "ours").items()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert len({path.stat().st_mode for path in (tmp_path / "ours").iterdir()}) == 1, "who may read one may read all"


def test_the_commands_know_an_imported_checkpoint(
    source: Path, imported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "--from", str(source), "--to", str(tmp_path / "weights")]) == 0
    said = capfd.readouterr().out
    assert f"moebius train --config {tmp_path}/weights/config.yaml" in said and "data.tokenizer.path" in said
    assert main(["checkpoints", str(tmp_path / "weights"), "--verify"]) == 0
    row = capfd.readouterr().out.splitlines()[1]
    assert re.search(r"^0 +\d{4}-.* weights, [\d.]+k parameters +from deepseek_v3 +verified", row), row
    arguments = ["generate", "--checkpoint", str(tmp_path / "weights"), "--prompt", "the", "--max-new-tokens", "3"]
    assert main(arguments) == 0
    assert capfd.readouterr().out.startswith("the")
    assert (
        main(["export", "--from", str(tmp_path / "weights"), "--to", str(tmp_path / "out"), "--file-size", "9KB"]) == 0
    )
    assert re.search(r"out: \d+ files of \w+ weights of a deepseek_v3 model", capfd.readouterr().out)
    with pytest.raises(SystemExit, match="2"):
        main(["export", "--from", "x", "--to", "y", "--file-size", "big"])
    assert "'big' is no size" in capfd.readouterr().err


# Sharing the process group with other tests of this process.
@pytest.mark.usefixtures("alone")
class TestTraining:
    """Runs that start from weights."""

    def config(self, small: Path, imported: Path, run_dir: Path, *more: str) -> tuple:
        """The small data under the imported config, as a person would have it."""
        data = [f"data.paths=[{small.parent}/texts]", f"data.cache_dir={small.parent}/cache", "data.source=text"]
        rest = "data.sequence_length=16 train.global_batch_tokens=64 train.steps=2 train.eval_sequences=2".split()
        path = imported / "config.yaml"
        overrides = [*data, *rest, f"run_dir={run_dir}", "metrics.tensorboard=false", *more]
        return load_config(str(path), overrides), str(path)

    def test_a_new_run_starts_from_imported_weights(self, small: Path, imported: Path, tmp_path: Path) -> None:
        run = prepare(*self.config(small, imported, tmp_path / "run"), False)
        expected = model_of(imported)
        assert run.step == 0 and run.engine.steps == 0
        for name, value in expected.state_dict().items():
            assert torch.equal(run.model.state_dict()[name], value), name
        assert all(not shard.state["exp_avg"].any() for shard in run.engine.shards())
        Loop(run).train()
        # What it has learned comes out under the published names, with what came with the weights.
        export_weights(str(tmp_path / "run"), tmp_path / "ours", None, None, 10**9)
        trained = dict(run.model.named_parameters())
        import_weights(tmp_path / "ours", tmp_path / "imported")
        exported = dict(model_of(tmp_path / "imported").named_parameters())
        assert all(torch.equal(value, exported[name]) for name, value in trained.items())
        assert not torch.equal(trained["embed.weight"], dict(expected.named_parameters())["embed.weight"])
        assert (tmp_path / "ours" / "generation_config.json").is_file()
        # And a run can start from that of another.
        again = prepare(*self.config(small, imported, tmp_path / "again", f"checkpoint.initial={tmp_path}/run"), False)
        assert all(torch.equal(value, trained[name]) for name, value in again.model.named_parameters())
        # Resuming does not read them again.
        resumed = prepare(
            *self.config(small, imported, tmp_path / "run", "train.steps=3", "checkpoint.initial=gone"), True
        )
        assert resumed.step == 2
        assert all(torch.equal(value, trained[name]) for name, value in resumed.model.named_parameters())

    def test_it_can_start_in_bf16(self, small: Path, imported: Path, tmp_path: Path) -> None:
        run = prepare(*self.config(small, imported, tmp_path / "run", "train.precision=bf16"), False)
        expected = dict(model_of(imported).named_parameters())
        assert all(torch.equal(value, expected[name].bfloat16()) for name, value in run.model.named_parameters())
        for shard in run.engine.shards():  # the masters lost nothing
            part = expected[shard.name].detach().flatten()[shard.offset : shard.offset + shard.size]
            assert torch.equal(shard.state["weight"], part)

    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            (["checkpoint.initial=nowhere"], r"config.yaml: checkpoint.initial: nowhere: holds no checkpoint"),
            (
                ["model.hidden_size=24"],
                r"config.yaml: checkpoint.initial: model.hidden_size: is 24, but .* is of a model with 12; use the",
            ),
        ],
    )
    def test_what_cannot_be_started_from(
        self, small: Path, imported: Path, tmp_path: Path, overrides: list[str], said: str
    ) -> None:
        with pytest.raises(UserError, match=said):
            prepare(*self.config(small, imported, tmp_path / "run", *overrides), False)
        assert not (tmp_path / "run").exists()

    def test_damaged_weights_are_not_started_from(self, small: Path, imported: Path, tmp_path: Path) -> None:
        copied = shutil.copytree(imported, tmp_path / "copied")
        (copied / "__1_0.distcp").open("r+b").truncate(1000)
        config = self.config(small, imported, tmp_path / "run", f"checkpoint.initial={copied}")
        with pytest.raises(UserError, match=r"__1_0.distcp: is damaged \(.*\); import or copy it again"):
            prepare(*config, False)

    def test_an_imported_checkpoint_is_not_resumed(self, small: Path, imported: Path, tmp_path: Path) -> None:
        config, where = self.config(small, imported, tmp_path / "run")
        shutil.copytree(imported, tmp_path / "run" / "checkpoints" / "step-000001")
        with pytest.raises(UserError, match=r"step-000001: holds weights only; start a new run from it with"):
            prepare(config, where, True)


@pytest.mark.usefixtures("alone")
def test_a_model_of_ours_can_be_exported(small: Path, tmp_path: Path) -> None:
    """Without a published model behind it: what transformers needs is made up from ours."""
    run_dir = tmp_path / "run"
    config = small_config(small, f"run_dir={run_dir}", "train.steps=1", "model.norm_eps=1e-6")
    run = prepare(config, str(small), False)
    Loop(run).train()
    export_weights(str(run_dir), tmp_path / "ours", None, None, 10**9)
    keys = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert keys["model_type"] == "deepseek_v3" and keys["num_key_value_heads"] == 2
    assert keys["max_position_embeddings"] == 32 and keys["eos_token_id"] == run.tokenizer.end_of_document
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("the token").input_ids == run.tokenizer.encode("the token")
    tokens = torch.tensor([run.tokenizer.encode("the token")])
    with torch.no_grad():
        ours, expected = run.model(tokens), theirs(input_ids=tokens).logits
    assert (ours - expected).norm() < 1e-5 * expected.norm()
