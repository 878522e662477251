"""benchmarks/step.py at a size that tells nothing about speed: that it runs, compares like with like, and prints."""

import math
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from backends import select
from benchmarks.contender import Unavailable
from benchmarks.peers import transformers
from benchmarks.table import Result, profile_table, result_table
from trainer.config.load import load_config
from trainer.model import MoETransformer
from trainer.model.count import count_parameters, flops_per_token

ROOT = Path(__file__).resolve().parents[2]
TINY = """
model.vocab_size=320 data.tokenizer.vocab_size=300 model.hidden_size=32 model.num_layers=2
model.dense_hidden_size=64 model.attention.num_heads=2 model.moe.num_experts=8 model.moe.top_k=2
model.moe.expert_hidden_size=16
""".split()
SHAPES = {
    "qwen3": ["model.attention.num_kv_heads=1", "model.attention.head_dim=16"],
    "dsv3": [
        *("model.attention.q_lora_rank=16", "model.attention.kv_lora_rank=16", "model.attention.qk_nope_head_dim=16"),
        *("model.attention.qk_rope_head_dim=16", "model.attention.v_head_dim=16"),
    ],
}


def bench(name: str, *more: str) -> subprocess.CompletedProcess[str]:
    config = ROOT / "configs" / "bench" / f"{name}.yaml"
    small = ["--sequence", "16", "--batch", "2", "--steps", "2", "--warmup", "0", "--threads", "1"]
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--config", str(config), *small, *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_table() -> None:
    done = bench("dsv3", "--peer", "transformers", "--profile", *TINY, *SHAPES["dsv3"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(ROOT)) and "did not run" not in done.stdout, done.stdout
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if " GiB " in line}
    assert list(rows) == ["moebius", "moebius-plain", "transformers"], done.stdout
    losses = []
    for line in rows.values():
        rate, low, high, step, _cpu, _mfu, memory, loss = (float(x) for x in re.findall(r"\d+(?:\.\d+)?", line)[:8])
        assert low <= rate <= high
        assert math.isclose(rate, 2 * 16 / step, rel_tol=0.05), line  # both are rounded
        assert 0.05 < memory < 4
        assert abs(loss - math.log(320)) < 0.3  # random tokens, first steps
        losses.append(loss)
    assert abs(losses[0] - losses[1]) < 0.002  # the engine and the plain loop train alike
    assert re.search(r"\d\.\d\d x$", rows["transformers"])
    assert re.search(r"matrix multiply: \d+ GFLOP/s at best", done.stdout)
    shares = [float(x) for x in re.findall(r"^\S.*?  +([\d.]+)%", done.stdout, re.MULTILINE)]
    assert len(shares) == 8 and abs(sum(shares) - 100) < 0.5, done.stdout


def job_of(name: str, *more: str) -> dict[str, Any]:
    """What the process of a peer is told of the tiny shape."""
    config = load_config(str(ROOT / "configs" / "bench" / f"{name}.yaml"), [*TINY, *SHAPES[name], *more])
    model = MoETransformer(config.model, select("cpu").ops)
    return {
        "model": asdict(config.model),
        "optimizer": asdict(config.optimizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": "fp32",
        "device": "cpu",
    }


@pytest.mark.parametrize("name", SHAPES)
def test_the_peer_has_as_many_parameters_and_learns(name: str) -> None:
    job = job_of(name)
    peer = transformers(job)
    assert peer.parameters == job["parameters"]
    tokens = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = [float(peer.step(tokens)) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_another_architecture_is_refused() -> None:
    """transformers' Qwen3 has no shared expert: comparing would flatter it."""
    with pytest.raises(Unavailable, match="Qwen3MoeForCausalLM of this shape has .* not the same architecture"):
        transformers(job_of("qwen3", "model.moe.num_shared_experts=1"))


def test_bad_input_is_one_line() -> None:
    done = bench("qwen3", "model.hidden_sise=3")
    assert done.returncode == 2
    assert done.stderr.startswith("moebius: command line: unknown key") and done.stderr.count("\n") == 1


def test_ratios_pair_the_rounds() -> None:
    """A machine that slows down half way must not change who is faster."""
    ours = Result(seconds=[1.0, 1.0, 3.0], cpu_seconds=[1.0] * 3, losses=[5.0] * 3)
    peer = Result(seconds=[2.0, 2.0, 6.0], cpu_seconds=[1.0] * 3, losses=[5.0] * 3)
    table = result_table({"moebius": ours, "peer": peer}, tokens=100, flops_per_token=1e9, peak=1e12)
    first, second = table.splitlines()[1:]
    assert first.split()[:5] == ["moebius", "100", "33-100", "1.000", "1.000"]
    assert second.endswith("2.00 x") and "0.050" in second  # 50 tokens/s of 1 GFLOP over 1 TFLOP/s


def test_shares_of_a_profile() -> None:
    table = profile_table({"moebius": Result(groups={"attention": 0.5, "other": 1.5}), "peer": Result()})
    assert "25.0%" in table and "75.0%" in table and "peer" not in table


@pytest.mark.parametrize(
    ("name", "total", "active"), [("qwen3", 114_435_584, 22_161_408), ("dsv3", 109_441_536, 28_177_408)]
)
def test_the_configs_count_as_expected(name: str, total: int, active: int) -> None:
    config = load_config(str(ROOT / "configs" / "bench" / f"{name}.yaml"), [])
    model = MoETransformer(config.model, select("cpu").ops)
    counts = count_parameters(model).values()
    assert (sum(c.total for c in counts), sum(c.active for c in counts)) == (total, active)
    assert flops_per_token(config.model, 512) > 6 * active * 0.8
