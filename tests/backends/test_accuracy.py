"""The measure of an operation's error: what it counts, and that it finds faults of the kinds that happen."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.accuracy import Errors, Finding, measure
from backends.cpu import CpuOperations
from backends.operations import ExpertOrder

CPU = torch.device("cpu")


def findings(ops: Any, run: Callable, dtype: torch.dtype = torch.float32, **inputs: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in measure(run, inputs, dtype, ops, CPU)}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_errors_by_hand():
    reference = torch.tensor([1.0, 3.0, 1e-9, -2.0], dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps  # an ulp between 1 and 2, 2 eps between 2 and 4
    found = Errors.of(torch.tensor([1 + eps, 3.0, 0, -2.0 - 4 * eps], dtype=torch.bfloat16), reference)
    rms = math.sqrt(14 / 4)  # 1.87: the third entry's error is counted in ulps of that
    assert found.max_ulps == pytest.approx(2.0)
    assert found.mean_ulps == pytest.approx((1 + 0 + 1e-9 / eps + 2) / 4)
    assert found.max_relative == pytest.approx(4 * eps / rms)
    assert found.mean_relative == pytest.approx((5 * eps + 1e-9) / 4 / rms)
    assert 0.9999 < found.cosine < 1


def test_errors_of_nothing_and_of_zeros():
    exact = Errors(0.0, 0.0, 0.0, 0.0, 1.0)
    empty, zeros = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert Errors.of(empty.float(), empty) == exact
    assert Errors.of(zeros.bfloat16(), zeros) == exact
    eps = torch.finfo(torch.float32).eps
    assert Errors.of(torch.tensor([0.0, 24 * eps]), zeros).max_ulps == 3  # as beside a reference of 8
    assert math.isnan(Errors.of(torch.tensor([0.0, math.nan]), zeros).max_ulps)
    assert Errors.of(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0], dtype=torch.float64)).cosine < 0


def test_every_output_and_gradient_is_named_once():
    found = findings(CpuOperations(), lambda ops, x, w, b: ops.linear(x, w, b), x=normal(4, 6), w=normal(5, 6), b=None)
    assert list(found) == ["output", "gradient of x", "gradient of w"]
    assert found["gradient of w"].shape == (5, 6) and found["output"].dtype == "float32"
    assert all(finding.passed and finding.errors and finding.plain for finding in found.values())
    pair = findings(
        CpuOperations(),
        lambda ops, x, w, labels: ops.linear_cross_entropy(x, w, labels),
        torch.bfloat16,
        x=normal(3, 8),
        w=normal(7, 8).detach(),
        labels=torch.tensor([1, -100, 6]),
    )
    assert list(pair) == ["output 0", "output 1", "gradient of x"]
    assert pair["output 0"].dtype == "float32" and pair["gradient of x"].dtype == "bfloat16"
    assert pair["output 1"].errors is None and pair["output 1"].passed


class Wrong(CpuOperations):
    """A correct operation with one fault."""

    def __init__(self, fault: Callable[[Tensor], Tensor]) -> None:
        self.fault = fault

    def swiglu(self, gate_up: Tensor, limit: float | None = None) -> Tensor:
        return self.fault(super().swiglu(gate_up, limit))


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


def one_entry_off(x: Tensor) -> Tensor:
    return x + torch.zeros_like(x).index_fill_(0, torch.tensor([1]), 3e-6)


FAULTS = {
    "rounded to bf16 on the way": (lambda x: x.bfloat16().float(), "output", "max_ulps is"),
    "one row off by 25 ulps": (one_entry_off, "output", "max_ulps is"),
    "not a number": (lambda x: x * float("nan"), "output", "max_ulps is nan"),
    "too large": (lambda x: x * 1.000001, "output", "ulps is"),
    "another dtype": (lambda x: x.double(), "output", "is not float32"),
    "another shape": (lambda x: x[:-1], "output", "has not the shape (33, 16)"),
    "half of the gradient": (Halved.apply, "gradient of x", "max_ulps is"),
    "no gradient": (lambda x: x.detach() + 0 * x, "gradient of x", "max_ulps is"),
}


@pytest.mark.parametrize("fault,name,problem", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_found(fault, name, problem):
    def run(ops: Any, x: Tensor) -> Tensor:
        return ops.swiglu(x)

    assert all(finding.passed for finding in findings(Wrong(lambda x: x), run, x=normal(33, 32)).values())
    found = findings(Wrong(fault), run, x=normal(33, 32))
    assert not found[name].passed and problem in found[name].problem


def test_indices_must_be_equal():
    class Unstable(CpuOperations):
        def sort_by_expert(self, experts_TK: Tensor, num_experts: int, dropping: bool = True) -> ExpertOrder:
            order = super().sort_by_expert(experts_TK, num_experts, dropping)
            swapped = order.order_P.clone()
            swapped[[0, 1]] = order.order_P[[1, 0]]  # two rows of one expert: every product is as right as before
            return ExpertOrder(swapped, order.inverse_TK, order.counts_E)

    def run(ops: Any, experts: Tensor) -> ExpertOrder:
        return ops.sort_by_expert(experts, 3)

    experts = torch.tensor([[0, 2], [0, 1]])
    assert all(f.passed for f in findings(CpuOperations(), run, experts=experts).values())
    found = findings(Unstable(), run, experts=experts)
    assert {name for name, finding in found.items() if not finding.passed} == {"order_P"}
    assert found["order_P"].problem == "is not equal"


def test_a_sum_in_bf16_is_found_where_fp32_is_promised():
    class Narrow(CpuOperations):
        def unpermute(self, y_PH: Tensor, order: ExpertOrder, weights_TK: Tensor) -> Tensor:
            total = torch.zeros(order.inverse_TK.shape[0], y_PH.shape[1], dtype=y_PH.dtype)
            for k in range(order.top_k):
                total = total + y_PH[order.inverse_TK[:, k]] * weights_TK[:, k : k + 1].to(y_PH.dtype)
            return total

    def run(ops: Any, y: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return ops.unpermute(y, ops.sort_by_expert(experts, 8), weights)

    experts = torch.rand(64, 8, generator=torch.Generator().manual_seed(2)).argsort(1)
    given = {"y": normal(512, 16), "weights": torch.rand(64, 8).requires_grad_(), "experts": experts}
    good = findings(CpuOperations(), run, torch.bfloat16, **given)
    assert all(finding.passed for finding in good.values()) and good["gradient of weights"].dtype == "float32"
    assert not findings(Narrow(), run, torch.bfloat16, **given)["output"].passed
