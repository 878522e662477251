"""A rank killed at any moment ends its job soon and with one line; the restarted run is the one never killed."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import tensors
from tests.small import write_inputs
from trainer import checkpoint

# name, ranks, overrides
LAYOUTS = [
    ("edp2-ep2", 4, "parallel.expert=2"),
    ("pp2-zbv", 2, "parallel.pipeline=2 parallel.schedule=zbv model.num_layers=4 train.micro_batch_size=1"),
    ("pp2-ep2", 4, "parallel.pipeline=2 parallel.expert=2"),
]
MOMENTS = ("save", "step", "saved", "start", "save", "step", "save", "saved", "step")  # of the long matrix
BOUND = 30.0  # seconds; gloo tells at once, and a busy machine takes its time


def attempt(folder: Path, name: str, ranks: int, overrides: str, kill: str = "", steps: int = 90) -> dict[str, Any]:
    """One attempt for tests/distributed/kill_ranks.py, on a run of its own name."""
    places = [f"data.paths=[{folder}/texts]", f"data.cache_dir={folder}/cache", f"run_dir={folder}/{name}"]
    run = [f"train.steps={steps}", "checkpoint.every=3", "train.eval_every=8", "schedule.kind=constant"]
    arguments = ["--config", f"{folder}/small.yaml", "--auto-resume", *places, *run, *overrides.split()]
    return {"ranks": ranks, "arguments": arguments, "run_dir": f"{folder}/{name}", "kill": kill}


def run(attempts: list[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """What became of each attempt; what every one has to be is checked here."""
    (outcomes,) = run_ranks(1, "tests.distributed.kill_ranks", json.dumps(attempts), timeout=timeout)
    for tried, outcome in zip(attempts, outcomes, strict=True):
        log = f"{tried['kill']}: {outcome['log']}"
        if not tried["kill"]:
            assert outcome["codes"] == [0] * tried["ranks"], log
            continue
        assert outcome["victim"] is not None, f"ended before it could be killed: {log}"
        assert outcome["seconds"] < BOUND, log
        assert "Traceback" not in log
        others = [code for rank, code in enumerate(outcome["codes"]) if rank != outcome["victim"]]
        told = [line for line in outcome["lines"] if "lost another process" in line]
        assert told == outcome["lines"], log
        if tried["kill"] == "start":  # a supervisor ends those that wait for a rank that never came
            assert set(others) <= {1, -signal.SIGTERM}, log
        else:
            assert set(others) == {1}, log
            assert len(told) == 1 and "--resume" in told[0] or "--auto-resume" in told[0], log
    return outcomes


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The records without what depends on the clock and the machine."""
    clock = ("times", "tokens_per_second", "tflops", "mfu", "seconds_left", "memory_gib")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Every figure of every step, and every bit of the final state."""
    assert figures(one) == figures(other)
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def kill_and_compare(folder: Path, layouts: Sequence[tuple[str, int, str]], moments: Sequence[str], steps: int) -> None:
    write_inputs(folder)
    for name, ranks, overrides in layouts:
        whole = attempt(folder, f"{name}-whole", ranks, overrides, steps=steps)
        killed = [attempt(folder, name, ranks, overrides, kill, steps) for kill in (*moments, "")]
        run([whole, *killed], timeout=120 + 60 * len(killed))
        assert_same_run(folder / f"{name}-whole", folder / name)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, LAYOUTS[1:2], ("save", "step"), steps=30)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_runs_killed_many_times_go_on_bit_for_bit(tmp_path: Path, layout: tuple[str, int, str]) -> None:
    kill_and_compare(tmp_path, [layout], MOMENTS, steps=90)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    layouts = [(4, "parallel.pipeline=2 parallel.expert=2", "step"), (2, "parallel.expert=2", "save"), (1, "", "")]
    changing = [attempt(tmp_path, "changing", *layout, steps=40) for layout in layouts]
    run([attempt(tmp_path, "whole", 2, "", steps=40), *changing], timeout=240)
    for one, other in zip(figures(tmp_path / "whole"), figures(tmp_path / "changing"), strict=True):
        if "loss" in one:
            # Other layouts add in another order; the bound of test_layouts.py, for twice as many steps.
            assert other["loss"] == pytest.approx(one["loss"], rel=2e-5)
    newest = checkpoint.newest(tmp_path / "changing")
    assert newest is not None and checkpoint.step_of(newest) == 40
