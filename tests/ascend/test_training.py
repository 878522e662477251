"""Runs of a few steps on simulated NPUs, alone and shared by two processes, next to the same runs on the CPU.

Everything of a run takes part: the loop, DeepSpeed's engine with torch's fused AdamW, process groups over
``cpu:gloo,npu:gloo``, evaluation and checkpoints. Only HCCL does not.
"""

import os
from unittest import mock

import pytest

from tests.distributed.ranks import run_ranks
from trainer.verify.difference import difference

STEPS = 2
COMMON = (
    f"model.num_layers=4 train.steps={STEPS} train.eval_every=2 train.bigram_baseline=false checkpoint.every={STEPS}"
)
LAYOUTS = {
    "alone": (1, ""),
    "experts shared": (2, "parallel.expert=2"),
    "a pipeline": (2, "parallel.pipeline=2 parallel.schedule=dualpipev"),  # a stream for each stage
    "gradients shared (ZeRO-2)": (2, "parallel.zero=2"),
}


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Run directories by layout, that of the CPU under "cpu", and the operators that NPUs called by world size."""
    folder = tmp_path_factory.mktemp("runs")
    place = {name: folder / name.replace(" ", "-") for name in ("cpu", *LAYOUTS)}

    def line(name: str, overrides: str) -> str:
        return f"run_dir={place[name]} {COMMON} {overrides}"

    run_ranks(1, "tests.distributed.train_many", str(small), line("cpu", "backend=cpu"))
    called = {}
    for world in (1, 2):
        lines = [line(name, overrides) for name, (size, overrides) in LAYOUTS.items() if size == world]
        with mock.patch.dict(os.environ, STAND_IN_NPUS=str(world)):
            called[world] = run_ranks(world, "tests.ascend.train_ranks", str(small), *lines, timeout=500, fresh=True)
    return place, called


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_on_npus_is_the_run_on_the_cpu(runs, layout):
    place, _ = runs
    apart = difference(place["cpu"], place[layout], STEPS)
    assert apart.within(1e-5), apart


def test_npus_did_the_work(runs):
    _, called = runs
    for world, ranks in called.items():
        for names in (rank["called"] for rank in ranks):
            assert {"npu::npu_grouped_matmul", "npu::npu_rms_norm", "npu::npu_rotary_mul"} <= names.keys()
            assert world == 1 or "c10d::alltoall_base_" in names
            assert "aten::_fused_adamw_" in names
    assert "npu::npu_fusion_attention" in called[1][0]["called"]


def test_no_garbage_is_collected_in_a_step(runs):
    _, told = runs
    for world, ranks in told.items():
        layouts = sum(size == world for size, _ in LAYOUTS.values())
        assert all(rank["collecting"] == [False] * STEPS * layouts for rank in ranks)
