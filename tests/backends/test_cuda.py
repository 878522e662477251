"""What can be known of the CUDA backend without a device: which kernel serves what, what it may call, and its settings.

That its operations give the right numbers is tests/backends/conformance's business.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backends import Operations, cuda
from backends.conformance import Case, cases
from backends.cuda import CudaBackend, CudaOperations
from backends.functions import flex, matmul

HOPPER, AMPERE, VOLTA = (9, 0), (8, 0), (7, 0)


def test_slots_say_what_serves_by_capability():
    slots = CudaBackend.planned()
    assert set(slots) == Operations.__abstractmethods__
    assert slots["grouped_mm"].implementation == "F.grouped_mm" and slots["linear"].fallback == ""
    older = cuda._slots(CudaOperations(grouped_kernel=cuda._has_grouped_kernel(AMPERE)), AMPERE)
    assert older["grouped_mm"].implementation == "mm per expert"
    assert older["grouped_mm"].fallback == "F.grouped_mm has no kernel for compute capability 8.0"
    assert older["linear"].fallback == ""
    assert "emulated" in cuda._slots(CudaOperations(), VOLTA)["linear"].fallback
    assert [cuda._has_grouped_kernel((major, 0)) for major in (7, 8, 9, 10, 12)] == [False, False, True, True, False]


def test_slots_say_why_a_function_is_not_compiled(monkeypatch):
    ops = CudaOperations()
    assert cuda._slots(ops, HOPPER)["swiglu"].implementation == "torch.compile"
    ops.compiled_swiglu.problem = "triton is not installed"
    monkeypatch.setattr(flex.compiled_attention, "problem", "no kernel")
    slots = cuda._slots(ops, HOPPER)
    assert (slots["swiglu"].implementation, slots["swiglu"].fallback) == ("F.silu times up", "triton is not installed")
    assert slots["rotary"].implementation == "torch.compile"
    assert slots["attention"].fallback.endswith("in blocks for sinks: no kernel")


@pytest.mark.parametrize(
    "kernel,dtype,sizes,expected",
    [
        (True, torch.bfloat16, (16, 8), "one"),
        (True, torch.bfloat16, (12, 8), "each"),
        (True, torch.float32, (16, 8), "each"),
        (False, torch.bfloat16, (16, 8), "each"),
    ],
)
def test_the_grouped_kernel_is_taken_for_what_it_can(monkeypatch, kernel, dtype, sizes, expected):
    taken = []
    one, each = cuda._GroupedMM.apply, matmul.grouped_mm
    monkeypatch.setattr(cuda._GroupedMM, "apply", lambda *given: taken.append("one") or one(*given))
    monkeypatch.setattr(matmul, "grouped_mm", lambda *given: taken.append("each") or each(*given))
    x, weight = torch.ones(4, sizes[1], dtype=dtype), torch.ones(2, *sizes, dtype=dtype)
    result = CudaOperations(kernel).grouped_mm(x, weight, torch.tensor([1, 3]))
    assert taken == [expected] and (result == sizes[1]).all()


# Operators that torch documents as raising on CUDA under torch.use_deterministic_algorithms, in every form or in the
# one that is named, and whose results vary from run to run without it.
VARYING = {
    "aten.put_", "aten.scatter_add_", "aten.scatter_reduce_", "aten.histc", "aten.kthvalue", "aten.median",
    "aten._embedding_bag_backward", "aten._embedding_bag_dense_backward", "aten.nll_loss2d_forward",
    "aten.cumsum_float", "aten.bincount_weights", "aten.resize_", "aten.index_add_float",
}  # fmt: skip


class Called(TorchDispatchMode):
    """The names of operators that run, with the forms told apart that matter above."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        self.names.add(name)
        if name in ("aten.cumsum", "aten.index_add_", "aten.index_add") and args[0].is_floating_point():
            self.names.add(name.rstrip("_") + "_float")
        if name == "aten.bincount" and len(args) > 1 and args[1] is not None:
            self.names.add("aten.bincount_weights")
        return func(*args, **(kwargs or {}))


def called(case: Case, dtype: torch.dtype) -> set[str]:
    inputs = {
        name: x.detach().to(dtype).requires_grad_() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x
        for name, x in case.inputs().items()
    }
    with Called() as seen:
        result = case.run(CudaOperations(), *inputs.values())
        result = result[0] if isinstance(result, tuple) else result
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.sum().backward()
    return seen.names


@pytest.mark.parametrize("operation", sorted(Operations.__abstractmethods__))
def test_no_operation_calls_what_varies_on_cuda(operation):
    names = set[str]()
    for case in cases(operation):
        if not case.slow:
            names |= called(case, torch.bfloat16) | called(case, torch.float32)
    assert names and not names & VARYING


def test_what_varies_would_be_seen():
    bag = Case(
        "none",
        "",
        lambda ops, weight: torch.nn.functional.embedding_bag(torch.tensor([[0, 1]]), weight, mode="sum").cumsum(0),
        lambda draw: {"weight": draw.normal(3, 4)},
    )
    assert called(bag, torch.float32) & VARYING == {"aten._embedding_bag_backward", "aten.cumsum_float"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_the_suite_of_a_device_fails_in_one_line_where_there_is_none():
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "tests/backends/conformance"]
    environment = {**os.environ, "MOEBIUS_TEST_BACKEND": "cuda"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 2
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert line.startswith("Exit: backend: 'cuda' is not available here")


def test_sorting_waits_for_the_device_only_where_choices_may_be_dropped():
    def waits(dropping: bool) -> set[str]:
        with Called() as seen:
            CudaOperations().sort_by_expert(torch.tensor([[0, 2], [1, 0]]), 3, dropping)
        return seen.names & {"aten._local_scalar_dense", "aten.bincount", "aten.item"}

    assert waits(False) == set()
    assert waits(True) == {"aten._local_scalar_dense"}
