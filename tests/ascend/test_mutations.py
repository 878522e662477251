"""Faults planted between our operations and torch_npu: the comparison of values has to catch every one.

Each is a mistake that a person makes who reads the operator's page quickly, and that many an operator accepts. Without
the fault the same cases pass (test_conformance.py).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from backends import ascend
from backends.accuracy import measure
from backends.conformance import cases
from backends.functions import ascend as functions
from tests.ascend.executor import HostExecutor
from tests.ascend.operators import Refused


def argument(operator: str, **changes: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change arguments on their way to an operator; numbers with an underscore are positions. None drops one."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = getattr(torch.ops.npu, operator)

        def changed(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            for name, change in changes.items():
                if name.startswith("_"):
                    given[int(name[1:])] = change(given[int(name[1:])])
                elif change is None:
                    kwargs.pop(name)
                else:
                    kwargs[name] = change(kwargs.get(name))
            return real(*given, **kwargs)

        changed.default = real.default  # type: ignore[attr-defined]  # torch looks here when it first calls one
        patch.setattr(torch.ops.npu, operator, changed)

    return plant


def attribute(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, value)


def one_group_all_the_same(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    (result,) = torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=counts, split_item=3, group_type=0, group_list_type=1
    )
    return result


def halves_swapped(x: torch.Tensor) -> torch.Tensor:
    return x.roll(x.shape[-1] // 2, -1)


MUTATIONS = {
    "a keyword that is not there": ("grouped_mm", argument("npu_grouped_matmul", group_types=lambda _: 0)),
    "group_type omitted": ("grouped_mm", argument("npu_grouped_matmul", group_type=None)),
    "group_type of the forward in the weight gradient": (
        "grouped_mm",
        argument("npu_grouped_matmul", group_type=lambda _: 0),
    ),
    "counts passed as cumulative sums": (
        "grouped_mm",
        argument("npu_grouped_matmul", group_list=lambda x: x.cumsum(0)),
    ),
    "cumulative sums where counts are passed": (
        "grouped_mm",
        argument("npu_grouped_matmul", group_list_type=lambda _: 0),
    ),
    "experts in another order": ("grouped_mm", argument("npu_grouped_matmul", group_list=lambda x: x.flip(0))),
    "a tensor for each group": ("grouped_mm", argument("npu_grouped_matmul", split_item=lambda _: 0)),
    "one group after all": ("grouped_mm", attribute(functions, "_each_group", one_group_all_the_same)),
    "what an expert without rows gives is kept": (
        "grouped_mm",
        attribute(torch.Tensor, "masked_fill_", lambda self, *_: self),
    ),
    "the transposed weight in both directions": (
        "grouped_mm",
        argument("npu_grouped_matmul", _1=lambda weights: [w.transpose(-1, -2) for w in weights]),
    ),
    "the bias of the next expert": ("add_expert_bias", attribute(torch, "repeat_interleave", lambda x, *a, **k: (
        _REPEAT(x.roll(1, 0) if x.device.type == "npu" else x, *a, **k)))),
    "rows sent to where they came from": ("permute", argument("npu_moe_token_permute", _1=lambda x: x.flip(0))),
    "the choices' own order": (
        "permute",
        argument("npu_moe_token_permute", _1=lambda x: torch.arange(x.numel(), device=x.device).view_as(x)),
    ),
    "a wrong index": ("unpermute", argument("npu_moe_token_unpermute", _1=lambda x: x.roll(1))),
    "weights of the other choice": ("unpermute", argument("npu_moe_token_unpermute", _2=lambda x: x.flip(1))),
    "weights left out": ("unpermute", argument("npu_moe_token_unpermute", _2=lambda x: None)),
    "fp32 weights to bf16 rows": ("unpermute", attribute(ascend, "_fits", lambda *x: x[0].numel() > 0)),
    "a wrong eps": ("rms_norm", argument("npu_rms_norm", _2=lambda eps: 10 * eps)),
    "the default eps": ("rms_norm", argument("npu_rms_norm", _2=lambda eps: 0.0)),
    "halves swapped": ("swiglu", argument("npu_swiglu", _0=halves_swapped)),
    "along another dimension": ("swiglu", argument("npu_swiglu", _1=lambda dim: 0)),
    "the clamp forgotten": ("swiglu", attribute(ascend.CpuOperations, "swiglu", lambda self, x, limit: (
        torch.ops.npu.npu_swiglu(x, -1)))),
    "the other rotary mode": (
        "rotary",
        argument("npu_rotary_mul", _3=lambda mode: {"half": "interleave", "interleave": "half"}[mode]),
    ),
    "no rotary mode": ("rotary", argument("npu_rotary_mul", _3=lambda mode: "half")),
    "turned the other way": ("rotary", argument("npu_rotary_mul", _2=lambda sin: -sin)),
    "tables of the narrow dtype": ("rotary", argument("npu_rotary_mul", _1=lambda cos: cos.bfloat16())),
    "the scale left out": ("attention", argument("npu_fusion_attention", scale=lambda scale: 1.0)),
    "the mask left out": ("attention", argument("npu_fusion_attention", atten_mask=lambda mask: None)),
    "the mask of what is seen": (
        "attention",
        argument("npu_fusion_attention", atten_mask=lambda mask: None if mask is None else ~mask),
    ),
    "causal from the upper left corner": (
        "attention",
        argument("npu_fusion_attention", sparse_mode=lambda mode: 2 if mode == 3 else mode),
    ),
    "a window of one more": (
        "attention",
        argument("npu_fusion_attention", pre_tockens=lambda before: min(before + 1, 2**31 - 1)),
    ),
    "the window forgotten": (
        "attention",
        argument("npu_fusion_attention", sparse_mode=lambda mode: 3 if mode == 4 else mode),
    ),
    "documents forgotten": (
        "attention",
        attribute(ascend, "_hidden", lambda S, documents, window: torch.ones(
            S, documents.shape[1], dtype=torch.bool, device=documents.device).triu_(1 + documents.shape[1] - S)),
    ),
    "the heads of the keys": ("attention", argument("npu_fusion_attention", _3=lambda heads: heads // 2)),
    "sinks forgotten": ("attention", lambda patch: patch.setattr(ascend.CpuOperations, "attention", (
        lambda self, q, k, v, scale, documents=None, window=0, sinks=None: ascend.AscendOperations().attention(
            q, k, v, scale, documents, window)))),
}  # fmt: skip
_REPEAT = torch.repeat_interleave


@pytest.mark.parametrize("fault", MUTATIONS)
def test_it_is_caught(npu, monkeypatch, fault):
    operation, plant = MUTATIONS[fault]
    plant(monkeypatch)
    for case in cases(operation):
        if case.slow:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            try:
                with HostExecutor():
                    found = measure(case.run, case.inputs(), dtype, npu.ops, npu.device)
            except (Refused, RuntimeError, TypeError, AssertionError):
                return
            if not all(finding.passed for finding in found):
                return
    pytest.fail(f"{fault}: every case of {operation} passes with it")
