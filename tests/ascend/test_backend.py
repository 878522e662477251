"""The backend itself on the simulated NPU: choosing it, and what it sets and says."""

import os

import pytest
import torch

import backends
from backends import peak
from backends.ascend_state import ENVIRONMENT
from backends.base import DTYPES
from backends.operations import Operations


def test_auto_finds_it(npu):
    found = backends.select("auto")
    assert (found.name, found.device, found.distributed_backend) == ("ascend", torch.device("npu", 0), "hccl")
    assert found.device_name == "Ascend910B1" and found.deepspeed_accelerator == "npu"


def test_a_rank_takes_its_own_npu(npu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(backends.UserError, match="LOCAL_RANK=1: this machine has 1 devices"):
        backends.select("ascend")


def test_no_fp64(npu):
    assert [dtype for dtype in DTYPES if npu.supports(dtype)] == [torch.float32, torch.bfloat16, torch.float16]


def test_fp32_is_fp32(npu):
    assert not torch.npu.matmul.allow_hf32 and not torch.npu.conv.allow_hf32


def test_variables_are_in_place_and_a_persons_stay(npu, monkeypatch):
    from backends.ascend_state import load

    assert npu.environment().items() >= ENVIRONMENT.items()
    assert os.environ["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:False"  # the Makefile's
    assert os.environ["HCCL_DETERMINISTIC"] == "true" and os.environ["DS_ACCELERATOR"] == "npu"
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "77")
    load()
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "77"


def test_memory_is_counted(npu):
    before = npu.memory().allocated
    npu.reset_peak_memory()
    held = torch.empty(2**20, device=npu.device)
    size = npu.memory().allocated - before
    assert 2**22 <= size < 2**22 + 1024  # rounded up to the allocator's unit
    assert npu.memory().peak - before == size
    del held
    assert npu.memory().allocated == before and npu.memory().peak - before == size
    npu.reset_peak_memory()
    assert npu.memory().peak == before and npu.memory().total == 64 * 2**30
    npu.synchronize()


def test_groups_that_ranks_wait_for_go_ahead(npu):
    assert [npu.group_options(axis) is None for axis in ("pp", "edp", "ep", "dp")] == [False, True, False, True]
    one, other = npu.group_options("ep"), npu.group_options("ep")
    assert one.is_high_priority_stream and one is not other and type(one).__name__ == "Options"


def test_every_slot_says_what_serves_it(npu, executor, monkeypatch):
    monkeypatch.setattr(peak, "_measure", lambda device, dtype, seconds: 1e9)
    assert npu.slots().keys() == npu.planned().keys() == Operations.__abstractmethods__
    (record,) = (record for record in backends.describe_all() if record["name"] == "ascend")
    assert record["available"] and record["dtypes"] == ["float32", "bfloat16", "float16"]
    assert "sinks" in record["operations"]["attention"]["fallback"]


@pytest.mark.parametrize(
    "sizes, called",
    [
        ({}, "npu_fusion_attention"),
        ({"sinks": True}, None),
        ({"head": 800}, None),
        ({"value_head": 24}, "npu_fusion_attention"),
    ],
)
def test_attention_goes_where_its_slot_says(npu, executor, sizes, called):
    head = sizes.get("head", 16)
    q, k = (torch.randn(1, 5, heads, head).to(npu.device) for heads in (4, 2))
    v = torch.randn(1, 5, 2, sizes.get("value_head", head)).to(npu.device)
    sinks = torch.zeros(4).to(npu.device) if sizes.get("sinks") else None
    npu.ops.attention(q, k, v, 0.25, sinks_N=sinks)
    assert ("npu::npu_fusion_attention" in executor.called) == (called is not None)


def test_dropped_choices_and_narrow_rows_are_gathered(npu, executor):
    choices = torch.tensor([[0, 1], [2, 1]]).to(npu.device)
    rows, weights = torch.randn(4, 8).to(npu.device), torch.rand(2, 2).to(npu.device)
    order = npu.ops.sort_by_expert(choices, 3, False)
    npu.ops.unpermute(rows, order, weights)
    assert any("moe_token_unpermute" in name for name in executor.called)
    executor.called.clear()
    npu.ops.unpermute(rows.bfloat16(), order, weights)
    dropping = npu.ops.sort_by_expert(choices.masked_fill(choices == 2, 3), 3)
    npu.ops.unpermute(rows[:3], dropping, weights)
    npu.ops.permute(rows[:2], dropping)
    assert not any("moe_token" in name for name in executor.called)
