"""The scripts and the manifest beside docs/launching.md, with stand-ins for what a cluster has."""

import json
import os
import random
import shlex
import socket
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from launch.arguments import train_parser
from tests.distributed.ranks import ROOT, environment, run_alone
from trainer.config.load import load_config
from trainer.config.validate import validate_layout

SCRIPTS = ROOT / "docs" / "launching"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout whose environment is this one; programs in ``stand-ins`` come first."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "stand-ins").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    path = f"{tmp_path}/stand-ins:{Path(sys.executable).parent}"
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"export PATH={path}:$PATH\n")
    return tmp_path


def stand_in(checkout: Path, program: str, script: str) -> None:
    path = checkout / "stand-ins" / program
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def run(checkout: Path, script: str, *arguments: str, **variables: str) -> str:
    """Output of a script of docs/launching, which has to succeed."""
    code, output = run_alone(["bash", str(SCRIPTS / script), *arguments], checkout, environment(**variables))
    assert code == 0, output
    return output


def check_layout(torchrun: list[str]) -> None:
    """That torchrun and launch/train.py understand their arguments, and the config fits the number of ranks."""
    launcher = get_args_parser().parse_args(torchrun)
    assert launcher.training_script == "launch/train.py"
    args = train_parser().parse_intermixed_args(launcher.training_script_args)
    ranks = int(launcher.nnodes) * int(launcher.nproc_per_node)
    validate_layout(load_config(str(ROOT / args.config), args.overrides), ranks, args.config)


def port_offset() -> int:
    """A job number whose port is free: slurm.sh adds it to 20000."""
    while True:
        number = random.randrange(10000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + number)):
                return number


@pytest.mark.slow
def test_the_slurm_script_trains(checkout: Path, small: Path) -> None:
    stand_in(checkout, "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    stand_in(checkout, "scontrol", "echo localhost")
    places = [f"data.paths=[{small.parent}/texts]", f"data.cache_dir={small.parent}/cache"]
    run(
        checkout,
        "slurm.sh",
        *["--config", str(small), *places, "parallel.expert=2", "train.steps=2", "run_dir=run"],
        SLURM_JOB_NODELIST="first",
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="2",
        SLURM_JOB_ID=str(port_offset()),
        PATH=f"{checkout}/stand-ins:{os.environ['PATH']}",
    )
    lines = (checkout / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2]


def test_the_manifest_starts_all_ranks() -> None:
    service, job = yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pods = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    # The first pod's name is found by way of the service.
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert pods["subdomain"] == service["metadata"]["name"]
    (container,) = pods["containers"]
    assert container["command"] == ["/bin/sh", "-c"]
    words = shlex.split(container["args"][0].removeprefix("exec torchrun ").replace("$JOB_COMPLETION_INDEX", "1"))
    launcher = get_args_parser().parse_args(words)
    assert launcher.master_addr == f"{name}-0.{pods['subdomain']}"
    assert int(launcher.nnodes) == spec["completions"]
    assert int(launcher.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pods["volumes"]}
    check_layout(words)


def test_the_ascend_script_starts_torchrun_in_its_environment(checkout: Path) -> None:
    (checkout / "set_env.sh").write_text("export CANN=loaded\n")
    stand_in(checkout, "torchrun", 'printf "%s\\n" "$CANN" "${RANK_TABLE_FILE-none}" "$@"')
    arguments = ["2", "1", "first", "--config", "configs/tiny.yaml", "parallel.expert=8"]
    given = run(
        checkout,
        "ascend.sh",
        *arguments,
        "train.global_batch_tokens=65536",
        ASCEND_TOOLKIT_HOME=str(checkout),
        RANK_TABLE_FILE="ranks.json",
    ).splitlines()
    assert given[:2] == ["loaded", "none"]
    launcher = get_args_parser().parse_args(given[2:])
    assert (launcher.nnodes, launcher.node_rank, launcher.master_addr) == ("2", 1, "first")
    check_layout(given[2:])
