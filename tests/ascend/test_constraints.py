"""What an NPU does not take, the executor refuses: its assertions are checked here, so that they cannot go stale."""

import re

import pytest
import torch

from tests.ascend.operators import Refused

NPU = torch.ops.npu


def on(npu, *shape, dtype=torch.float32):
    return torch.ones(shape).to(npu.device, dtype)


def integers(npu, *values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype).to(npu.device)


def grouped(npu, counts, experts=2, rows=4, **changes):
    given = {"group_list": integers(npu, *counts), "split_item": 3, "group_type": 0, "group_list_type": 1} | changes
    return NPU.npu_grouped_matmul([on(npu, rows, 8)], [on(npu, experts, 8, 6)], **given)


def attention(npu, mask=None, heads=2, key_shape=(1, 4, 2, 8), value_shape=(1, 4, 2, 8), **more):
    q, k, v = (on(npu, *shape) for shape in ((1, 4, heads, 8), key_shape, value_shape))
    return NPU.npu_fusion_attention(q, k, v, heads, "BSND", atten_mask=mask, **more)


def rotary(npu, shape, table, mode="half"):
    return NPU.npu_rotary_mul(on(npu, *shape), on(npu, *table), on(npu, *table), mode)


CASES = {
    "a group_list of counts must not have the length 1": lambda npu: grouped(npu, [4], experts=1),
    "groups [4, 4] of type 1 for 4 rows": lambda npu: grouped(npu, [4, 4]),
    "groups [-1, 5] of type 1": lambda npu: grouped(npu, [-1, 5]),
    "groups [3, 1] of type 0": lambda npu: grouped(npu, [3, 1], group_list_type=0),
    "group_list: int64": lambda npu: grouped(npu, [], group_list=integers(npu, 1, 3, dtype=torch.int32)),
    "group_type None": lambda npu: grouped(npu, [1, 3], group_type=None),
    "split_item 0 gives a tensor per group": lambda npu: grouped(npu, [1, 3], split_item=0),
    "more than 1024 groups": lambda npu: grouped(npu, [0] * 1024 + [4], experts=1025),
    "an operand is empty": lambda npu: grouped(npu, [0, 0], rows=0),
    "a list holds at most 128 tensors": lambda npu: NPU.npu_grouped_matmul(
        [on(npu, 1, 2)] * 129, [on(npu, 2, 2)] * 129, split_item=0, group_type=-1
    ),
    "x may not be transposed": lambda npu: NPU.npu_grouped_matmul(
        [on(npu, 8, 4).T], [on(npu, 2, 8, 6)], group_list=integers(npu, 1, 3), split_item=3, group_type=0,
        group_list_type=1,
    ),
    "x has to be transposed": lambda npu: NPU.npu_grouped_matmul(
        [on(npu, 8, 4)], [on(npu, 4, 6)], group_list=integers(npu, 1, 3), split_item=3, group_type=2, group_list_type=1
    ),
    "npu_grouped_matmul: one dtype": lambda npu: NPU.npu_grouped_matmul(
        [on(npu, 4, 8, dtype=torch.bfloat16)], [on(npu, 2, 8, 6)], group_list=integers(npu, 1, 3), split_item=3,
        group_type=0, group_list_type=1,
    ),
    "npu_moe_token_unpermute: one dtype": lambda npu: NPU.npu_moe_token_unpermute(
        on(npu, 2, 4, dtype=torch.bfloat16), integers(npu, 0, 1, dtype=torch.int32), on(npu, 1, 2)
    ),
    "sorted_indices: int32": lambda npu: NPU.npu_moe_token_unpermute(
        on(npu, 2, 4), integers(npu, 0, 1), on(npu, 1, 2)
    ),
    "none negative": lambda npu: NPU.npu_moe_token_permute(on(npu, 1, 4), integers(npu, [-1, 0])),
    "K <= 512": lambda npu: NPU.npu_moe_token_permute(on(npu, 1, 4), on(npu, 1, 513, dtype=torch.int64)),
    "npu_rms_norm: one dtype": lambda npu: NPU.npu_rms_norm(on(npu, 2, 8), on(npu, 8, dtype=torch.bfloat16), 1e-6),
    "npu_swiglu: one dtype of fp16, bf16, fp32": lambda npu: NPU.npu_swiglu(on(npu, 2, 8, dtype=torch.float64), -1),
    "npu_rotary_mul: one dtype": lambda npu: NPU.npu_rotary_mul(
        on(npu, 1, 3, 2, 8, dtype=torch.bfloat16), on(npu, 1, 3, 1, 8), on(npu, 1, 3, 1, 8), "half"
    ),
    "tables (2, 3, 1, 8)": lambda npu: rotary(npu, (2, 3, 2, 8), (2, 3, 1, 8), "interleave"),
    "limits of (1, 3, 2, 896)": lambda npu: rotary(npu, (1, 3, 2, 896), (1, 3, 1, 896)),
    "rotary_mode neox": lambda npu: rotary(npu, (1, 3, 2, 8), (1, 3, 1, 8), "neox"),
    "sparse_mode 3 without its mask": lambda npu: attention(npu, sparse_mode=3),
    "the compressed mask": lambda npu: attention(npu, on(npu, 4, 4, dtype=torch.bool), sparse_mode=3),
    "atten_mask: bool or uint8": lambda npu: attention(npu, on(npu, 4, 4), sparse_mode=1),
    "a query that sees no key": lambda npu: attention(npu, on(npu, 4, 4, dtype=torch.bool), sparse_mode=1),
    "shapes of query, key, value": lambda npu: attention(npu, value_shape=(1, 4, 2, 6)),
    "heads": lambda npu: attention(npu, heads=3),
    "keep_prob=0.9 has no reference": lambda npu: attention(npu, keep_prob=0.9),
    "a head of more than 768": lambda npu: NPU.npu_fusion_attention(*[on(npu, 1, 2, 1, 800)] * 3, 1, "BSND"),
    "an NPU multiplies no fp64 matrices": lambda npu: torch.mm(*[on(npu, 2, 2, dtype=torch.float64)] * 2),
    "torch_npu has no kernel for it": lambda npu: torch.segment_reduce(on(npu, 4), "sum", lengths=integers(npu, 1, 3)),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_it_is_refused(npu, executor, what):
    with pytest.raises(Refused, match=re.escape(what)):
        CASES[what](npu)


def test_without_the_executor_nothing_computes(npu):
    """Stubs of CANN that reported success would leave memory as it was."""
    with pytest.raises(RuntimeError):
        (torch.empty(4, device=npu.device) + 1).cpu()
