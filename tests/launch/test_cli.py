"""The command as a person types it."""

import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from launch import cli, train
from launch.arguments import train_parser


def moebius(capfd, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command run in this process."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as exit:  # argparse
        code = exit.code
    return code, *capfd.readouterr()


def test_help_lists_every_command(capfd):
    code, out, _ = moebius(capfd, "--help")
    assert code == 0 and all(f"\n  {name} " in out for name in ("train", "generate", "eval", "info", "params", "plot"))


def test_a_bare_command_shows_the_help(capfd):
    code, out, err = moebius(capfd)
    assert (code, err) == (2, "") and "\ncommands:\n" in out


@pytest.mark.parametrize("active", [True, False])
def test_commands_to_try_are_those_that_the_shell_finds(tmp_path, monkeypatch, active):
    program = tmp_path / "env" / "bin" / "moebius"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(program.parent / "python"))
    monkeypatch.setenv("PATH", str(program.parent) if active else "")
    monkeypatch.chdir(tmp_path)
    assert train._moebius() == ("moebius" if active else "env/bin/moebius")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert train._moebius() == ("moebius" if active else str(program))


def test_version(capfd):
    assert moebius(capfd, "--version") == (0, f"moebius {version('moebius-train')}\n", "")


def test_help_and_mistyped_commands_import_nothing_heavy():
    quick = [
        ["--help"],
        ["trian"],
        ["generate", "--help"],
        ["eval", "--help"],
        ["train", "--help"],
        ["train", "--train.steps=5"],
    ]
    assert imported(quick) == []


def test_a_mistake_in_a_config_is_found_without_torch(config):
    """Importing it takes seconds."""
    mistakes = ["model.topk=1", "train.steps=many", "model.moe.top_k=99", "optimizer.lr=.inf"]
    slow = [["train", "--config", config, mistake] for mistake in mistakes]
    slow += [["train", "--config", f"{config}.none"], ["generate", "--run", f"{config}.none"]]
    slow += [["eval", "--run", f"{config}.none", "data.paths=[x]"], ["eval", "--run", ".", "data.pahts=[x]"]]
    assert imported(slow) == ["omegaconf"]


def imported(commands: list[list[str]]) -> list[str]:
    """Which heavy packages a process that fails or explains itself in these ways has imported."""
    code = (
        "import sys; from launch.cli import main\n"
        f"for argv in {commands!r}:\n"
        "    try: assert main(argv) == 2\n"
        "    except SystemExit: pass\n"
        "print(*sorted({'torch', 'deepspeed', 'rich', 'omegaconf'} & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ran.stderr.splitlines()[-1].split()


def test_unknown_command_is_one_line(capfd):
    code, out, err = moebius(capfd, "trian")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("moebius: argument command: invalid choice: 'trian'") and "train" in err


@pytest.mark.parametrize("command", ["train", "params"])
def test_help_of_a_config_command_goes_on_with_every_key(capfd, command):
    code, out, _ = moebius(capfd, command, "--help")
    assert code == 0 and "--config PATH" in out and "\n  model.moe.top_k\n" in out
    assert ("--resume" in out) == (command == "train") and "local_rank" not in out


def test_missing_config_flag_is_one_line(capfd):
    assert moebius(capfd, "params") == (
        2,
        "",
        "moebius: the following arguments are required: --config; see `moebius params --help`\n",
    )


def test_train_arguments_in_any_order():
    args = train_parser().parse(
        ["--local_rank=1", "train.steps=5", "--config", "x.yaml", "seed=1", "--resume", "name=a=b"]
    )
    assert args.overrides == ["train.steps=5", "seed=1", "name=a=b"]
    assert (args.config, args.resume, args.sample, args.debug, args.local_rank) == ("x.yaml", True, False, False, 1)


@pytest.mark.parametrize(
    ("arguments", "resume"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "--sample"], True),
        (["--resume", "seed=1"], True),
        (["--resume", "runs/a/checkpoints/step-000250", "seed=1"], "runs/a/checkpoints/step-000250"),
        (["--resume=runs/a=b"], "runs/a=b"),
    ],
)
def test_resume_may_name_a_checkpoint(arguments, resume):
    for given in (["--config", "x", *arguments], [*arguments, "--config=x"]):
        args = train_parser().parse(given)
        assert (args.resume, args.overrides) == (resume, ["seed=1"] if "seed=1" in arguments else [])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--config", "x", "--train.steps=5"], "'--train.steps=5' is a key, not a flag; write train.steps=5"),
        (["-train.steps=5"], "'-train.steps=5' is a key, not a flag; write train.steps=5"),
        (["--train.steps", "5"], "'--train.steps' is a key, not a flag; write train.steps=5"),
        (["--seed=1"], "'--seed=1' is a key, not a flag; write seed=1"),
        (["configs/tiny.yaml"], "'configs/tiny.yaml' stands alone; write --config configs/tiny.yaml"),
        (["--sample", "tiny.yml"], "'tiny.yml' stands alone; write --config tiny.yml"),
        (["--config", "x.yaml", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_arguments_that_are_misspelt_get_the_right_spelling(capfd, arguments, hint):
    assert moebius(capfd, "train", *arguments) == (2, "", f"moebius: {hint}; see `moebius train --help`\n")


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text("model: {vocab_size: 4096, hidden_size: 64, num_layers: 2, dense_layers: 1, mtp_layers: 1}\n")
    return str(path)


def test_params_table_is_plain_in_a_pipe(capfd, config):
    code, out, err = moebius(capfd, "params", "--config", config, "model.moe.num_experts=4")
    assert (code, err) == (0, "") and "\x1b" not in out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    assert rows["routed experts"][2:] == ["196,608", "197k", "98,304", "98.3k"]
    assert "multi-token prediction" in rows and rows["all"][0] == "all"


def test_params_json_adds_up(capfd, config):
    _, out, _ = moebius(capfd, "params", "model.mtp_layers=0", "--json", "--config", config, "seed=1")
    found = json.loads(out)
    assert found["total"] == sum(part["total"] for part in found["parts"].values())
    assert found["active"] == sum(part["active"] for part in found["parts"].values()) < found["total"]
    assert found["flops_per_token"] > 6 * found["parts"]["head"]["total"]


def test_params_of_a_config_that_is_wrong(capfd, config):
    assert moebius(capfd, "params", "--config", config, "model.hiden_size=3") == (
        2,
        "",
        "moebius: command line: unknown key 'model.hiden_size'; did you mean 'model.hidden_size'?\n",
    )


def test_info(capfd, monkeypatch):
    monkeypatch.setattr("backends.base.Backend.peak_flops", lambda self, dtype: 2e11, raising=False)
    code, out, _ = moebius(capfd, "info")
    assert code == 0 and "\x1b" not in out
    for wanted in ("python", "deepspeed", "torch_npu", "CPU threads", "can be used here", "gloo", "float32", "FLOP/s"):
        assert wanted in out, wanted


def test_info_json_says_why_a_backend_cannot_be_used(capfd):
    _, out, _ = moebius(capfd, "info", "--json")
    found = json.loads(out)
    assert found["versions"]["moebius"] == version("moebius-train") and found["devices"]["cpu_threads"] >= 1
    backends = {backend["name"]: backend for backend in found["backends"]}
    assert set(backends) == {"cpu", "cuda", "ascend"} and backends["cpu"]["available"]
    assert all(backend["reason"] for backend in found["backends"] if not backend["available"])
    assert backends["cuda"]["operations"]["grouped_mm"]["implementation"] == "F.grouped_mm"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_info_says_what_would_serve_on_a_device_that_is_not_here(capfd, monkeypatch):
    monkeypatch.setattr("backends.base.Backend.peak_flops", lambda self, dtype: 2e11, raising=False)
    _, out, _ = moebius(capfd, "info")
    assert re.search(r"attention +would be F.scaled_dot_product_attention \(flex_attention with documents", out)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "one of the arguments --run --checkpoint is required"),
        (["--run", "x", "--checkpoint", "y"], "argument --checkpoint: not allowed with argument --run"),
        (["--run", "x", "--top-p", "1.5"], "argument --top-p: '1.5' is not a number above 0 and at most 1"),
        (["--run", "x", "--top-p", "nan"], "argument --top-p: 'nan' is not a number above 0 and at most 1"),
        (["--run", "x", "--temperature", "-1"], "argument --temperature: '-1' is not a number of 0 or more"),
        (
            ["--run", "x", "--max-new-tokens", "1.5"],
            "argument --max-new-tokens: '1.5' is not a whole number of 0 or more",
        ),
    ],
)
def test_generate_refuses_wrong_arguments(capfd, arguments, problem):
    assert moebius(capfd, "generate", *arguments) == (2, "", f"moebius: {problem}; see `moebius generate --help`\n")


def test_generate_without_a_run(capfd, tmp_path):
    code, _, err = moebius(capfd, "generate", "--run", str(tmp_path / "none"))
    assert code == 2 and err == (
        f"moebius: {tmp_path}/none: there is no such folder; give a run directory, or a folder inside its "
        "checkpoints/\n"
    )
    code, _, err = moebius(capfd, "generate", "--run", str(tmp_path))
    assert code == 2 and err.startswith(f"moebius: {tmp_path}: holds no checkpoint") and err.count("\n") == 1


def test_eval_shows_the_keys_that_it_takes_and_no_others(capfd):
    code, out, _ = moebius(capfd, "eval", "--help")
    assert code == 0 and "\n  data.paths\n" in out and "\n  train.eval_sequences\n" in out
    assert "model." not in out and "data.shuffle" not in out and "optimizer" not in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "one of the arguments --run --checkpoint is required"),
        (["--run", "x", "--data.paths=[y]"], "'--data.paths=[y]' is a key, not a flag; write data.paths=[y]"),
    ],
)
def test_eval_refuses_wrong_arguments(capfd, arguments, problem):
    assert moebius(capfd, "eval", *arguments) == (2, "", f"moebius: {problem}; see `moebius eval --help`\n")


def test_plot_of_no_run(capfd, tmp_path):
    code, out, err = moebius(capfd, "plot", str(tmp_path))
    assert (code, out) == (2, "")
    assert err == (
        f"moebius: {tmp_path}/metrics.jsonl: there is no such file; give the directory of a run that has started\n"
    )


def test_plot(capfd, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 8.0}\n{"step": 2, "loss": 7.5}\n')
    out = str(tmp_path / "loss.png")
    assert moebius(capfd, "plot", str(tmp_path), "--out", out) == (0, f"{out}\n", "")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
