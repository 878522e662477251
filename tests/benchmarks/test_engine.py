"""benchmarks/engine.py at a size that tells nothing about speed: both contenders train alike, and it prints that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = """
model.hidden_size=32 model.num_layers=2 model.dense_hidden_size=64 model.vocab_size=320 data.tokenizer.vocab_size=300
model.attention.num_heads=2 model.moe.num_experts=4 model.moe.expert_hidden_size=16 data.sequence_length=16
train.global_batch_tokens=128 train.micro_batch_size=1 optimizer.clip_norm=0.3
""".split()


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "engine.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_table() -> None:
    done = bench("--steps", "3", "--warmup", "1", *TINY)
    assert done.returncode == 0, done.stderr
    rows = {layout: done.stdout.partition(layout)[2].splitlines()[0].split() for layout in ("1f1b", "dp4")}
    for row in rows.values():
        assert row[1] == "M"
        parameters, step, _, our_step, _, ratio, update, _, our_update, _, loss, our_loss = (
            float(cell) if cell not in ("M", "s") else 0.0 for cell in [row[0], *row[2:]]
        )
        assert 0 < update < step and 0 < our_update < our_step and ratio > 0 and parameters < 1
        # The fourth step's loss, after three updates that clipped: the same but for the order of sums.
        assert our_loss == pytest.approx(loss, rel=1e-5)
    # One model, under two layouts.
    assert rows["1f1b"][0] == rows["dp4"][0] and float(rows["1f1b"][-1]) == pytest.approx(float(rows["dp4"][-1]), 1e-5)


def test_bad_input_is_one_line() -> None:
    done = bench("parallel.expert=3")
    assert done.returncode == 2
    assert done.stderr.startswith("moebius: ") and done.stderr.count("\n") == 1
