"""Every operation, of both classes, against the naive formula in fp64: values, gradients, dtypes and odd shapes.

CudaOperations holds no CUDA call, so that it runs here on CPU tensors wherever torch's operators exist there.
"""

import naive_operations as naive
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from backends import Operations
from backends.cpu import CpuOperations
from backends.cuda import CudaOperations
from backends.functions import attention as blockwise
from backends.functions import cross_entropy, elementwise, matmul

# How far a result may lie from the fp64 formula, as a share of the result's largest entry. fp64 and fp32: some
# hundred roundings of sums of a few hundred terms. bf16 keeps 8 bits: one rounding is 2^-9 = 0.2 %; inputs are exact
# in the reference, but torch's own bf16 operators (CudaOperations) round intermediates too, three or four times.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)
CLASSES = [CpuOperations, CudaOperations]


@pytest.fixture(params=CLASSES, ids=["cpu", "cuda"])
def ops(request: pytest.FixtureRequest) -> Operations:
    torch.manual_seed(0)
    return request.param()


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def compare(run, formula, inputs, dtype, tolerance=None) -> Tensor:
    """Run on the inputs and the formula on their fp64 copies; compare the result and all gradients."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    result, expected = run(*inputs), formula(*wide)
    assert result.shape == expected.shape
    grad = torch.randn(expected.shape, dtype=torch.float64).to(result.dtype)
    grads = torch.autograd.grad(result, inputs, grad)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    for ours, theirs, source in zip((result, *grads), (expected, *expected_grads), (None, *inputs), strict=True):
        assert source is None or ours.dtype == source.dtype
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        error = (ours.double() - theirs).abs().max().item() if theirs.numel() else 0.0
        assert error <= (tolerance or TOLERANCE[dtype]) * max(scale, 1e-3), (error, scale)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (0, 4, 6)])
def test_linear(ops, dtype, shape):
    rows, inner, outer = shape
    x, weight, bias = (normal(*s, dtype=dtype) for s in ((2, rows, inner), (outer, inner), (outer,)))
    compare(ops.linear, lambda x, w, b: x @ w.T + b, (x, weight, bias), dtype)
    result = compare(ops.linear, lambda x, w: x @ w.T, (x, weight), dtype)
    assert result.dtype == dtype


def test_linear_bf16_is_rounded_once_where_the_processor_has_no_bf16_units(monkeypatch):
    monkeypatch.setattr(matmul.processor, "multiplies_bf16", lambda: False)
    x, weight = normal(64, 300, dtype=torch.bfloat16), normal(32, 300, dtype=torch.bfloat16)
    result = CpuOperations().linear(x, weight)
    assert torch.equal(result, (x.float() @ weight.float().T).bfloat16())
    monkeypatch.setattr(matmul.processor, "multiplies_bf16", lambda: True)
    compare(CpuOperations().linear, lambda x, w: x @ w.T, (x, weight), torch.bfloat16)


COUNTS = [[3, 0, 5, 1], [9], [0, 0, 0], [0, 7], [2, 2, 2, 2]]


# F.grouped_mm (cuda) wants rows of 16 bytes, hence the sizes; the CPU's own takes any.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_mm(ops, dtype, counts):
    sizes = (16, 8) if isinstance(ops, CudaOperations) else (5, 3)
    x, weight = normal(sum(counts), sizes[1], dtype=dtype), normal(len(counts), *sizes, dtype=dtype)
    counts_E = torch.tensor(counts)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([part @ w.T for part, w in zip(x.split(counts), weight.unbind(), strict=True)])

    compare(lambda x, w: ops.grouped_mm(x, w, counts_E), formula, (x, weight), dtype)
    ops.grouped_mm(x, weight, counts_E).sum().backward()  # the gradient of a sum is expanded, with stride 0
    for expert, count in enumerate(counts):
        if not count:
            assert torch.equal(weight.grad[expert], torch.zeros_like(weight[expert]))


EXPERTS = {
    "usual": ([[0, 1], [2, 0], [3, 2]], 4),
    "one expert": ([[0], [0], [0]], 1),
    "empty experts": ([[5, 1], [1, 5]], 7),
    "one token": ([[2, 0, 1]], 3),
    "some dropped": ([[0, 4], [4, 4], [3, 0]], 4),
    "all dropped": ([[2, 2], [2, 2]], 2),
    "no tokens": ([], 3),
}


@pytest.fixture(params=EXPERTS.values(), ids=EXPERTS.keys())
def choice(request) -> tuple[Tensor, int]:
    experts, num_experts = request.param
    return torch.tensor(experts, dtype=torch.int64).view(len(experts), -1 if experts else 2), num_experts


def test_sort_by_expert(ops, choice):
    experts_TK, num_experts = choice
    order = ops.sort_by_expert(experts_TK, num_experts)
    flat = experts_TK.flatten().tolist()
    kept = [i for i in sorted(range(len(flat)), key=lambda i: flat[i]) if flat[i] < num_experts]
    assert order.order_P.tolist() == kept
    assert order.counts_E.tolist() == [flat.count(e) for e in range(num_experts)]
    assert order.inverse_TK.flatten().tolist() == [kept.index(i) if i in kept else -1 for i in range(len(flat))]
    assert order.dropped == (len(kept) < len(flat))
    if not order.dropped:
        undropped = ops.sort_by_expert(experts_TK, num_experts, dropping=False)
        assert torch.equal(undropped.order_P, order.order_P) and torch.equal(undropped.counts_E, order.counts_E)


@pytest.mark.parametrize("dtype", DTYPES)
def test_permute(ops, choice, dtype):
    order = ops.sort_by_expert(*choice)
    x = normal(choice[0].shape[0], 6, dtype=dtype)
    compare(lambda x: ops.permute(x, order), lambda x: x[order.order_P // order.top_k], (x,), dtype)


@pytest.mark.parametrize("weights_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpermute(ops, choice, dtype, weights_dtype):
    order = ops.sort_by_expert(*choice)
    tokens, top_k = choice[0].shape
    y = normal(order.order_P.numel(), 6, dtype=dtype)
    weights = normal(tokens, top_k, dtype=weights_dtype or dtype)
    tolerance = TOLERANCE[torch.float32] if dtype == torch.float64 and weights_dtype else None  # fp32 weight gradient
    compare(
        lambda y, w: ops.unpermute(y, order, w),
        lambda y, w: naive.unpermute(y, order, w),
        (y, weights),
        dtype,
        tolerance,
    )


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_take_rows(ops, dtype, rows):
    index = torch.randperm(rows)
    compare(
        lambda x: ops.take_rows(x, index, index.argsort()), lambda x: x[index], (normal(rows, 4, dtype=dtype),), dtype
    )


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 4), (0, 4), (2, 3, 5, 7)])
def test_rms_norm(ops, dtype, shape, blocked, monkeypatch):
    if blocked:
        monkeypatch.setattr(elementwise, "_BLOCK_ELEMENTS", 17)
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)
    compare(lambda x, w: ops.rms_norm(x, w, 1e-2), lambda x, w: naive.rms_norm(x, w, 1e-2), (x, weight), dtype)


def test_rms_norm_of_an_fp32_residual_has_the_dtype_of_its_bf16_weight(ops):
    x, weight = normal(5, 8, dtype=torch.float32), normal(8, dtype=torch.bfloat16)
    result = compare(
        lambda x, w: ops.rms_norm(x, w, 1e-6), lambda x, w: naive.rms_norm(x, w, 1e-6), (x, weight), torch.bfloat16
    )
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 2), (0, 4)])
def test_swiglu(ops, dtype, shape, blocked, monkeypatch):
    if blocked:
        monkeypatch.setattr(elementwise, "_BLOCK_ELEMENTS", 17)
    x = normal(*shape, dtype=dtype)
    compare(ops.swiglu, naive.swiglu, (x,), dtype)
    compare(lambda x: ops.swiglu(x, 0.5), lambda x: naive.swiglu(x, 0.5), (x,), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0], [0, 4, 0]])
def test_add_expert_bias(ops, dtype, counts):
    inputs = normal(sum(counts), 6, dtype=dtype), normal(len(counts), 6, dtype=dtype)
    compare(
        lambda y, b: ops.add_expert_bias(y, b, torch.tensor(counts)),
        lambda y, b: naive.add_expert_bias(y, b, counts),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch,half", [(2, 2), (1, 4), (2, 1)])
def test_rotary(ops, dtype, interleaved, batch, half):
    x = normal(2, 5, 3, 8, dtype=dtype)
    angle = torch.randn(batch, 5, half)
    cos, sin = angle.cos(), angle.sin()
    compare(
        lambda x: ops.rotary(x, cos, sin, interleaved), lambda x: naive.rotary(x, cos, sin, interleaved), (x,), dtype
    )
    part = torch.cat((x, x), -1)[..., 8:]  # a slice of a projection, as MLA passes it
    assert torch.equal(ops.rotary(part, cos, sin, interleaved), ops.rotary(x, cos, sin, interleaved))


DOCUMENTS = {
    "none": None,
    "packed": [[0] * 4 + [1] * 7, [5] * 11],
    "one position each": [list(range(11)), [0] * 3 + [9] * 8],
    "any order": [[0, 1, 0, 1, 2, 2, 0, 1, 0, 3, 3], [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]],
}


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("heads,sizes", [((4, 2), (8, 8)), ((3, 3), (6, 4)), ((4, 1), (4, 6)), ((1, 1), (1, 1))])
@pytest.mark.parametrize("block,scores", [(4, 1), (4, 2**21), (128, 2**21)])  # each sequence alone, or both at once
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(ops, dtype, block, scores, heads, sizes, documents, monkeypatch):
    if isinstance(ops, CudaOperations) and block == 4:
        pytest.skip("blocks are the CPU's")
    monkeypatch.setattr(blockwise, "_BLOCK", block)
    monkeypatch.setattr(blockwise, "_SCORES", scores)
    S, (N, M), (D, W) = 11, heads, sizes
    inputs = [normal(2, S, *s, dtype=dtype) for s in ((N, D), (M, D), (M, W))]
    documents_BS = None if documents is None else torch.tensor(documents)
    # torch's bf16 attention (cuda) rounds the probabilities to bf16 before it sums over them
    tolerance = 2.5e-2 if dtype == torch.bfloat16 and isinstance(ops, CudaOperations) else None
    compare(
        lambda q, k, v: ops.attention(q, k, v, 0.3, documents_BS),
        lambda q, k, v: naive.attention(q, k, v, 0.3, documents_BS),
        inputs,
        dtype,
        tolerance,
    )


@pytest.mark.parametrize(
    "window,sinks,queries,documents",
    [
        (0, False, 6, None),
        (0, False, 1, "packed"),
        (0, True, 11, None),
        (2, False, 11, "any order"),
        (3, True, 11, "packed"),
        (3, False, 11, None),
        (7, False, 5, None),
        (7, True, 1, "any order"),
        (20, True, 9, None),
    ],
)
@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_window_sinks_and_fewer_queries_than_keys(
    ops, dtype, block, window, sinks, queries, documents, monkeypatch
):
    if isinstance(ops, CudaOperations) and block == 4 and not sinks:
        pytest.skip("blocks are the CPU's")
    monkeypatch.setattr(blockwise, "_BLOCK", block)
    S, L, N, M, D, W = queries, 11, 4, 2, 8, 6
    inputs = [normal(*s, dtype=dtype) for s in ((2, S, N, D), (2, L, M, D), (2, L, M, W), (N,))]
    documents_BL = torch.tensor(DOCUMENTS[documents]) if documents else None
    tolerance = 2.5e-2 if dtype == torch.bfloat16 and isinstance(ops, CudaOperations) else None
    compare(
        lambda q, k, v, *s: ops.attention(q, k, v, 0.3, documents_BL, window, *s),
        lambda q, k, v, *s: naive.attention(q, k, v, 0.3, documents_BL, window, *s),
        inputs if sinks else inputs[:3],
        dtype,
        tolerance,
    )


def test_attention_survives_large_scores(ops):
    q = normal(1, 6, 1, 4, dtype=torch.float32)
    result = ops.attention(q, q, q, 1e4)
    assert result.isfinite().all() and torch.autograd.grad(result.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("chunk_bytes", [1, 500, 2**25])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labels", [[3, -100, 0, 12, -100], [-100, -100], [7], []])
def test_linear_cross_entropy(ops, dtype, labels, chunk_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", chunk_bytes)
    labels_T = torch.tensor(labels, dtype=torch.int64)
    hidden, weight = normal(len(labels), 6, dtype=dtype), normal(13, 6, dtype=dtype)
    loss = compare(
        lambda h, w: ops.linear_cross_entropy(h, w, labels_T)[0],
        lambda h, w: naive.linear_cross_entropy(h, w, labels_T),
        (hidden, weight),
        dtype,
    )
    _, count = ops.linear_cross_entropy(hidden, weight, labels_T)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert count.item() == sum(label != -100 for label in labels) and count.dtype == torch.int64


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
        (lambda y, w: ops.unpermute(y, order, w), (y, weights)),
        (lambda x, w: ops.rms_norm(x, w, 1e-2), (x, normal(4))),
        (ops.swiglu, (x,)),
        (lambda x: ops.swiglu(x, 0.5), (x,)),
        (lambda y, b: ops.add_expert_bias(y, b, order.counts_E), (y, normal(3, 4))),
        (lambda x: ops.rotary(x, angle.cos(), angle.sin(), True), (normal(1, 3, 2, 4),)),
        (lambda q, k, v: ops.attention(q, k, v, 0.5), (normal(1, 3, 2, 4), normal(1, 3, 1, 4), normal(1, 3, 1, 3))),
        (lambda h, w: ops.linear_cross_entropy(h, w, torch.tensor([1, -100, 0]))[0], (x, normal(5, 4))),
    ]
    if not isinstance(ops, CudaOperations):
        checks.append((lambda x, w: ops.grouped_mm(x, w, order.counts_E), (y, normal(3, 2, 4))))
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
