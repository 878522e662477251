"""What the table of cases (tests/backends/conformance) does not show of the operations of both classes.

CudaOperations holds no CUDA call, so that it runs here on CPU tensors wherever torch's operators exist there.
"""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from backends import Operations
from backends.accuracy import measure
from backends.conformance import cases
from backends.cpu import CpuOperations
from backends.cuda import CudaOperations
from backends.functions import attention as blockwise
from backends.functions import cross_entropy, elementwise, matmul

CLASSES = [CpuOperations, CudaOperations]


@pytest.fixture(params=CLASSES, ids=["cpu", "cuda"])
def ops(request: pytest.FixtureRequest) -> Operations:
    torch.manual_seed(0)
    return request.param()


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def passes(operation: str, dtype: torch.dtype) -> None:
    for case in cases(operation):
        if not case.slow:
            found = measure(case.run, case.inputs(), dtype, CpuOperations(), torch.device("cpu"))
            assert not [f"{case.name}: {f.name}: {f.problem}" for f in found if not f.passed]


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu"])
def test_rows_in_blocks(operation, monkeypatch):
    monkeypatch.setattr(elementwise, "_BLOCK_ELEMENTS", 83)
    passes(operation, torch.float32)


@pytest.mark.parametrize("scores", [1, 2**21])  # each sequence alone, or both at once
def test_attention_in_small_blocks(scores, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK", 4)
    monkeypatch.setattr(blockwise, "_SCORES", scores)
    passes("attention", torch.float32)


@pytest.mark.parametrize("chunk_bytes", [1, 5000])  # a token at a time, or a few
def test_linear_cross_entropy_in_small_chunks(chunk_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", chunk_bytes)
    passes("linear_cross_entropy", torch.float32)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("operation", ["linear", "grouped_mm"])
def test_bf16_with_and_without_bf16_units(operation, units, monkeypatch):
    monkeypatch.setattr(matmul.processor, "multiplies_bf16", lambda: units)
    passes(operation, torch.bfloat16)


def test_linear_bf16_is_rounded_once_where_the_processor_has_no_bf16_units(monkeypatch):
    monkeypatch.setattr(matmul.processor, "multiplies_bf16", lambda: False)
    x, weight = normal(64, 300, dtype=torch.bfloat16), normal(32, 300, dtype=torch.bfloat16)
    result = CpuOperations().linear(x, weight)
    assert torch.equal(result, (x.float() @ weight.float().T).bfloat16())


def test_an_expert_without_rows_has_a_weight_gradient_of_zero(ops):
    for dtype in (torch.float32, torch.bfloat16):
        weight = normal(4, 16, 8, dtype=dtype)
        ops.grouped_mm(normal(9, 8, dtype=dtype), weight, torch.tensor([3, 0, 6, 0])).sum().backward()
        assert weight.grad.flatten(1).any(1).tolist() == [True, False, True, False]


def test_an_order_knows_whether_choices_were_dropped(ops):
    experts = torch.tensor([[0, 2], [1, 0]])
    assert not ops.sort_by_expert(experts, 3).dropped and ops.sort_by_expert(experts, 2).dropped
    assert ops.sort_by_expert(experts, 3).top_k == 2


def test_unpermute_accumulates_in_fp32(ops):
    """A sum of 1 and many halves of bf16's last place: bf16 additions, or bf16 weights, would lose each of them."""
    top_k = 65
    order = ops.sort_by_expert(torch.arange(top_k).unsqueeze(0), top_k)
    weights = torch.full((1, top_k), 2.0**-9)
    weights[0, 0] = 1 + 2.0**-12
    result = ops.unpermute(torch.ones(top_k, 1, dtype=torch.bfloat16), order, weights)
    assert result.item() == 1.125
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    ops.permute(x, order).backward(weights.view(-1, 1).bfloat16())
    assert x.grad.item() == 1.125


def test_attention_survives_large_scores(ops):
    q = normal(1, 6, 1, 4, dtype=torch.float32)
    result = ops.attention(q, q, q, 1e4)
    assert result.isfinite().all() and torch.autograd.grad(result.sum(), q)[0].isfinite().all()


def test_linear_cross_entropy_of_a_confident_model_is_neither_infinite_nor_rounded_away(ops):
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[300.0], [0.0], [290.0]])
    loss, _ = ops.linear_cross_entropy(hidden.requires_grad_(), weight, torch.tensor([1, 2]))
    assert loss.item() == pytest.approx(310.0 + 2 * 4.5399e-5, rel=1e-6)


def test_gradients_by_finite_differences(ops):
    order = ops.sort_by_expert(torch.tensor([[0, 2], [3, 1], [2, 0]]), 3)
    x, weights, y = normal(3, 4), normal(3, 2), normal(5, 4)
    angle = torch.randn(1, 3, 2)
    checks = [
        (ops.linear, (normal(3, 4), normal(5, 4), normal(5))),
        (lambda x: ops.permute(x, order), (x,)),
        (lambda x, w: ops.grouped_mm(x, w, order.counts_E), (y, normal(3, 2, 4))),
        (lambda y, w: ops.unpermute(y, order, w), (y, weights)),
        (lambda x, w: ops.rms_norm(x, w, 1e-2), (x, normal(4))),
        (ops.swiglu, (x,)),
        (lambda x: ops.swiglu(x, 0.5), (x,)),
        (lambda y, b: ops.add_expert_bias(y, b, order.counts_E), (y, normal(3, 4))),
        (lambda x: ops.rotary(x, angle.cos(), angle.sin(), True), (normal(1, 3, 2, 4),)),
        (lambda q, k, v: ops.attention(q, k, v, 0.5), (normal(1, 3, 2, 4), normal(1, 3, 1, 4), normal(1, 3, 1, 3))),
        (lambda h, w: ops.linear_cross_entropy(h, w, torch.tensor([1, -100, 0]))[0], (x, normal(5, 4))),
    ]
    for run, inputs in checks:
        assert gradcheck(run, inputs)


def test_under_checkpointing_and_no_grad(ops):
    order = ops.sort_by_expert(torch.tensor([[0, 1], [1, 0], [1, 0]]), 2)
    weight, norm, head = (
        normal(2, 16, 8, dtype=torch.float32),
        normal(8, dtype=torch.float32),
        normal(9, 8, dtype=torch.float32),
    )
    mix = normal(3, 2, dtype=torch.float32)

    def layer(x: Tensor) -> Tensor:
        rows = ops.permute(ops.rms_norm(x, norm, 1e-6), order)
        y = ops.unpermute(ops.swiglu(ops.grouped_mm(rows, weight, order.counts_E)), order, mix)
        return ops.linear_cross_entropy(y, head, torch.tensor([1, 2, 3]))[0]

    x = normal(3, 8, dtype=torch.float32)
    leaves = (x, weight, norm, head, mix)
    plain = torch.autograd.grad(layer(x), leaves)
    recomputed = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.detach()))


def test_only_what_needs_a_gradient_gets_one(ops):
    x, weight = normal(4, 8, dtype=torch.float32), torch.randn(2, 16, 8)
    (grad,) = torch.autograd.grad(ops.grouped_mm(x, weight, torch.tensor([1, 3])).sum(), x)
    assert grad.shape == x.shape
    loss, _ = ops.linear_cross_entropy(torch.randn(3, 8), normal(5, 8, dtype=torch.float32), torch.tensor([0, 1, 2]))
    loss.backward()
