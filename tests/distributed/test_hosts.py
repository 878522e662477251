"""Two hosts with addresses of their own, under both launchers: they train what one process trains."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.hosts import missing, run_on_first
from tests.distributed.ranks import ROOT, free_port, run_ranks
from tests.small import write_inputs

pytestmark = pytest.mark.slow  # eight processes that import everything: minutes on two cores

LAYOUT = ["parallel.pipeline=2", "parallel.expert=2"]  # of four ranks, two on each host
STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and its text, the documents' hosts file, and what one process makes of it."""
    if missing():
        pytest.skip(missing())
    folder = tmp_path_factory.mktemp("hosts").resolve()
    config = write_inputs(folder)
    (folder / "hosts").write_text("first slots=2\nsecond slots=2\n")
    run_ranks(1, "tests.distributed.train_many", str(config), f"train.steps={STEPS} run_dir={folder}/one")
    return folder


def arguments(folder: Path, name: str) -> list[str]:
    places = [f"data.paths=[{folder}/texts]", f"data.cache_dir={folder}/cache", f"run_dir={folder}/{name}/run"]
    return ["--config", f"{folder}/small.yaml", "backend=cpu", f"train.steps={STEPS}", *LAYOUT, *places]


def with_deepspeed(folder: Path, name: str, hidden: Path | None = None) -> tuple[int, str]:
    """Exit code and output of ``deepspeed --hostfile hosts launch/train.py``, started on the first host."""
    (folder / name / "home").mkdir(parents=True)
    # Only variables in this file travel to other hosts.
    (folder / name / "home" / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", f"{folder}/hosts"]
    command = [*launcher, "--master_port", str(free_port()), "launch/train.py", *arguments(folder, name)]
    return run_on_first(folder / name, command, 240, hidden)


def with_torchrun(folder: Path, name: str) -> tuple[int, str]:
    """Exit code and output of ``torchrun launch/train.py`` on both hosts."""
    (folder / name).mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "first", "--master-port", str(free_port())]
    first, second = (
        shlex.join([*launcher, "--node-rank", str(number), "launch/train.py", *arguments(folder, name)])
        for number in range(2)
    )
    remote = f"cd {ROOT} && OMP_NUM_THREADS=1 exec {second}"
    return run_on_first(folder / name, ["sh", "-c", f"ssh second {shlex.quote(remote)} & {first} && wait $!"], 240)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("launch", [with_deepspeed, with_torchrun])
def test_two_hosts_train_what_one_process_trains(folder: Path, launch: Callable) -> None:
    name = launch.__name__
    code, output = launch(folder, name)
    assert code == 0, output[-6000:]
    expected, found = records(folder / "one"), records(folder / name / "run")
    assert len(expected) == len(found) == STEPS + 1  # and an evaluation
    for one, other in zip(expected, found, strict=True):
        for key in ("loss", "grad_norm", "validation_loss"):
            if key in one:
                # fp32 sums in another order, as in test_layouts.py
                assert other[key] == pytest.approx(one[key], rel=1e-5), (one["step"], key)


def test_what_one_host_lacks_ends_both_with_one_line_and_exit_code_2(folder: Path) -> None:
    code, output = with_deepspeed(folder, "hidden", folder / "texts")
    assert code == 2, output[-6000:]
    (line,) = (line for line in output.splitlines() if "moebius: " in line)
    assert re.match(r"first: moebius: rank [23] on second: .*data.paths", line)
    assert "Traceback" not in output
    assert not (folder / "hidden" / "run").exists()
