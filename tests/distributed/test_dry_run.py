"""What a dry run predicts, against the resident memory of small layouts; and what it takes for 4,096 ranks."""

import json
import resource
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT, environment, run_alone, run_ranks

# 36 million parameters: 580 MB of weights, gradients and moments, beside which buffers of libraries are small.
LARGE = """
    model.hidden_size=512 model.num_layers=6 model.vocab_size=8192 model.moe.num_experts=16
    model.moe.expert_hidden_size=384 model.dense_hidden_size=1536 model.attention.num_heads=8
    model.attention.q_lora_rank=128 model.attention.kv_lora_rank=128 model.attention.qk_nope_head_dim=32
    model.attention.v_head_dim=32 model.attention.qk_rope_head_dim=16 model.init_std=0.02 data.sequence_length=512
    train.micro_batch_size=4 train.global_batch_tokens=8192
""".split()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["", "parallel.expert=2", "parallel.pipeline=2"])
def test_resident_memory(layout: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 5 %: pages that are only partly used, the heap's own, and scratch space of kernels are in no account."""
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")  # freed memory goes back, so that what is resident is in use
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    world = 2 if layout else 1
    arguments = [str(small), *LARGE, *layout.split()]
    # The variables are read when a process starts: forked ranks would be without them.
    measured = run_ranks(world, "tests.distributed.dry_run_cases", "measure", *arguments, fresh=True)
    for rank in range(world):
        (predicted,) = run_ranks(1, "tests.distributed.dry_run_cases", "predict", f"{world},{rank}", *arguments)
        print(layout, rank, measured[rank], predicted, predicted / measured[rank] - 1)
        assert predicted == pytest.approx(measured[rank], rel=0.05)


@pytest.mark.slow
def test_4096_ranks() -> None:
    """The last stage of the 105 billion parameters, within 2 minutes and 8 GB; docs/dry-run.md has the first.

    Of processor time: this machine may have other things to do.
    """
    rank = 4095
    config = "configs/models/telechat3-105b.yaml"
    command = f"train --config {config} --dry-run --json --world-size 4096 --rank {rank}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, output = run_alone([sys.executable, "-m", "launch.cli", *command.split()], ROOT, environment(), timeout=900)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0, output
    found = json.loads(output[output.index("{") :])
    assert found["place"]["pp"] == [rank // 512, 8] and 2**30 < found["peak"] < 64 * 2**30
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    assert after.ru_maxrss * 1024 < 8e9
