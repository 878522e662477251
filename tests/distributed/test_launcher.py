"""The deepspeed launcher itself: it trains, stops politely, and passes our exit code on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT, environment, free_port, run_ranks, stop
from tests.small import write_inputs
from trainer import checkpoint


def launch(ranks: int, *arguments: str) -> subprocess.Popen:
    """``deepspeed --num_accelerators ranks launch/train.py arguments``, output in a pipe."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return subprocess.Popen(
        [*launcher, "--master_port", str(free_port()), "launch/train.py", *arguments],
        cwd=ROOT,
        env=environment(DS_ACCELERATOR="cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def test_it_trains_what_one_process_trains_and_stops_on_sigterm(tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    places = [f"data.paths=[{tmp_path}/texts]", f"data.cache_dir={tmp_path}/cache", "schedule.kind=constant"]
    arguments = [*places, "parallel.expert=2", "train.steps=100000", "train.eval_every=0", f"run_dir={tmp_path}/two"]
    process = launch(2, "--config", str(config), *arguments)
    try:
        metrics, end = tmp_path / "two" / "metrics.jsonl", time.monotonic() + 120
        while time.monotonic() < end and not (metrics.exists() and len(losses(tmp_path / "two")) >= 8):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)  # as a scheduler or Ctrl-C does: to all of them
        output, _ = process.communicate(timeout=60)
    finally:
        stop(process)
    done = losses(tmp_path / "two")
    newest = checkpoint.newest(tmp_path / "two")
    assert newest is not None and checkpoint.step_of(newest) == len(done) >= 8, output
    assert f"stopped after step {len(done)}, saved; go on with --resume" in output

    line = f"schedule.kind=constant train.steps={len(done)} train.eval_every=0 run_dir={tmp_path}/one"
    run_ranks(1, "tests.distributed.train_many", str(config), line)
    assert done[:20] == pytest.approx(losses(tmp_path / "one")[:20], rel=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize(
    ("ranks", "override", "message"),
    [
        (3, "parallel.expert=2", "parallel.expert: 3 ranks do not divide into groups of 2; use 1"),
        pytest.param(2, "parallel.expert=3", "model.moe.num_experts=8 is not divisible by 3", marks=pytest.mark.slow),
    ],
)
def test_a_layout_that_cannot_be_is_one_line_and_exit_code_2(
    tmp_path: Path, ranks: int, override: str, message: str
) -> None:
    config = write_inputs(tmp_path)
    process = launch(
        ranks, "--config", str(config), override, f"data.paths=[{tmp_path}/texts]", f"run_dir={tmp_path}/r"
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        stop(process)
    assert process.returncode == 2, output
    assert [line for line in output.splitlines() if message in line and line.startswith("moebius: ")], output
    assert "Traceback" not in output
    assert not (tmp_path / "r").exists()
