"""What the operators of torch_npu compute, written from their documentation, with its constraints as refusals.

Whatever the documentation leaves open comes out as NaN, so that nobody relies on it. Everything is computed in fp32 and
rounded once. The sources are the docstrings of torch_npu 2.13 and the operator pages of its documentation
(https://www.hiascend.com/document), which give the limits for the training products A2 and A3.

Shape suffixes as in backends/operations.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

INNER_LIMIT = 65536  # npu_grouped_matmul: the last dimension of an operand is below it
MOST_GROUPS = 1024  # of one weight tensor
MOST_TENSORS = 128  # of a tensor list
MOST_INDICES = 16777215  # npu_moe_token_permute: more cannot be sorted
NARROW = (torch.float16, torch.bfloat16, torch.float32)

_REFERENCES: dict[str, Callable[..., Any]] = {}


class Refused(RuntimeError):
    """An NPU would not run this, or not as an NPU."""


def reference(name: str) -> Callable[..., Any] | None:
    """The reference of an operator, by its qualified name; None if there is none."""
    return _REFERENCES.get(name)


def _named(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        _REFERENCES[name] = function
        return function

    return note


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


def _same_narrow(what: str, *tensors: Tensor | None) -> None:
    dtypes = {x.dtype for x in tensors if x is not None}
    _need(len(dtypes) == 1 and dtypes <= set(NARROW), f"{what}: one dtype of fp16, bf16, fp32, not {dtypes}")


@_named("aten::matmul_backward")
def _matmul_backward(grad: Tensor, self: Tensor, other: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor]:
    _need(min(self.dim(), other.dim()) >= 2, "the gradient of a product with a vector has no reference")
    _need(self.dtype != torch.float64, "an NPU multiplies no fp64 matrices")
    grad_self = (grad @ other.transpose(-1, -2)).sum_to_size(self.shape)
    if other.dim() == 2:
        return grad_self, self.flatten(0, -2).T @ grad.flatten(0, -2)
    return grad_self, (self.transpose(-1, -2) @ grad).sum_to_size(other.shape)


@_named("npu::npu_format_cast")
def _format_cast(self: Tensor, acl_format: int, *others: Any, **more: Any) -> Tensor:
    return self  # here all memory lies as torch says


@_named("npu::npu_gather_backward")
def _gather_backward(grad: Tensor, self_size: list[int], dim: int, index: Tensor, sparse_grad: bool) -> Tensor:
    return grad.new_zeros(self_size).scatter_add(dim, index, grad)


@_named("aten::mm.dtype")
def _mm_wide(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    _need(self.dtype == mat2.dtype and self.dtype.itemsize == 2 and out_dtype == torch.float32, "16 bits to fp32")
    return self.float() @ mat2.float()


@_named("npu::npu_grouped_matmul")
def _grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    group_list: Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    act_type: int = 0,
    **others: Any,
) -> list[Tensor]:
    _need(all(value is None for value in others.values()), f"only plain groups have a reference, not {others}")
    _need(max(len(x), len(weight)) <= MOST_TENSORS, f"a list holds at most {MOST_TENSORS} tensors")
    _need(len(x) == len(weight) == 1, "only one operand each has a reference")
    (a,), (b,) = x, weight
    _same_narrow("npu_grouped_matmul", a, b)
    _need(
        group_list is not None and group_list.dtype == torch.int64 and group_list.dim() == 1, "group_list: int64 (E,)"
    )
    _need(group_type in (0, 2) and act_type == 0, f"group_type {group_type}, act_type {act_type}: no training product")
    _need(split_item in (2, 3), f"split_item {split_item} gives a tensor per group")
    _need(a.dim() == 2 and a.numel() > 0 and b.numel() > 0, "an operand is empty or not of two dimensions")
    groups = group_list.tolist()
    _need(len(groups) <= MOST_GROUPS, f"more than {MOST_GROUPS} groups")
    _need(group_list_type in (0, 1), f"group_list_type {group_list_type}")
    if group_list_type == 1:
        _need(len(groups) > 1, "a group_list of counts must not have the length 1")
        counts = groups
    else:
        counts = [end - start for start, end in zip([0, *groups], groups, strict=False)]
    rows = a.shape[0] if group_type == 0 else a.shape[1]
    _need(min(counts) >= 0 and sum(counts) == rows, f"groups {groups} of type {group_list_type} for {rows} rows")
    if group_type == 0:
        _need(a.is_contiguous(), "x may not be transposed")
        _need(b.dim() == 3 and len(counts) == b.shape[0] and b.shape[1] == a.shape[1], f"weight {tuple(b.shape)}")
        _need(b.is_contiguous() or b.transpose(1, 2).is_contiguous(), "weight: as it lies, or transposed")
        lasts = a.shape[1], b.shape[2] if b.is_contiguous() else b.shape[1]
    else:
        _need(a.T.is_contiguous() and b.is_contiguous(), "x has to be transposed and weight not")
        _need(b.dim() == 2 and b.shape[0] == a.shape[1], f"weight {tuple(b.shape)}")
        lasts = a.shape[0], b.shape[1]
    _need(max(lasts) < INNER_LIMIT, f"a last dimension of {INNER_LIMIT} or more")
    parts = []
    ends = torch.tensor(counts).cumsum(0).tolist()
    for number, (count, end) in enumerate(zip(counts, ends, strict=True)):
        rows_of = slice(end - count, end)
        if group_type == 0:
            parts.append(a[rows_of].float() @ b[number].float())
        elif count:
            parts.append(a[:, rows_of].float() @ b[rows_of].float())
        else:  # what a group of no rows gives is not documented
            parts.append(torch.full((a.shape[0], b.shape[1]), float("nan")))
    return [(torch.cat(parts) if group_type == 0 else torch.stack(parts)).to(a.dtype)]


@_named("npu::npu_moe_token_permute")
def _permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    _need(not padded_mode and not num_out_tokens, "only whole and unpadded permutations have a reference")
    _same_narrow("npu_moe_token_permute", tokens)
    _need(tokens.dim() == indices.dim() == 2 and len(tokens) == len(indices) > 0, "tokens (T, H), indices (T, K)")
    _need(indices.dtype in (torch.int32, torch.int64) and indices.shape[1] <= 512, "indices: integers, K <= 512")
    _need(indices.numel() < MOST_INDICES and int(indices.min()) >= 0, f"fewer than {MOST_INDICES}, none negative")
    order = indices.flatten().argsort(stable=True)
    return tokens[order // indices.shape[1]], order.argsort().to(torch.int32)


@_named("npu::npu_moe_token_permute_grad_v2")
def _permute_grad(
    grad_permuted_tokens: Tensor,
    sorted_indices: Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topK: int,
    padded_mode: bool = False,
) -> Tensor:
    rows = grad_permuted_tokens.float()[sorted_indices.long()]
    return rows.view(tokens_size_0, num_topK, -1).sum(1).to(tokens_dtype)


@_named("npu::npu_moe_token_unpermute")
def _unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> Tensor:
    _need(not padded_mode and restore_shape is None, "only unpadded permutations have a reference")
    _same_narrow("npu_moe_token_unpermute", permuted_tokens, probs)
    _need(sorted_indices.dtype == torch.int32 and sorted_indices.dim() == 1, "sorted_indices: int32 (T * K,)")
    _need(sorted_indices.shape[0] == permuted_tokens.shape[0] > 0, "a row for every choice")
    _need(probs is None or probs.shape[1] <= 512, "K <= 512")
    rows = permuted_tokens.float()[sorted_indices.long()]
    if probs is None:
        return rows.to(permuted_tokens.dtype)
    _need(probs.numel() == len(rows), "a weight for every choice")
    weighted = rows.view(*probs.shape, -1) * probs.float().unsqueeze(2)
    return weighted.sum(1).to(permuted_tokens.dtype)


@_named("npu::_npu_moe_token_unpermute")
def _unpermute_and_keep(permuted_tokens: Tensor, *others: Any, **more: Any) -> tuple[Tensor, Tensor]:
    return _unpermute(permuted_tokens, *others, **more), permuted_tokens  # and what the backward needs


@_named("npu::npu_moe_token_unpermute_grad")
def _unpermute_grad(
    permuted_tokens: Tensor,
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> tuple[Tensor, Tensor]:
    _same_narrow("npu_moe_token_unpermute_grad", permuted_tokens, grad_unpermuted_tokens, probs)
    _need(probs is not None, "only weighted sums have a reference")
    rows = permuted_tokens.float()[sorted_indices.long()].view(*probs.shape, -1)
    grad = grad_unpermuted_tokens.float().unsqueeze(1)
    grad_rows = torch.empty_like(permuted_tokens)
    grad_rows[sorted_indices.long()] = (grad * probs.float().unsqueeze(2)).flatten(0, 1).to(grad_rows.dtype)
    return grad_rows, (grad * rows).sum(2).to(probs.dtype)


@_named("npu::npu_moe_token_unpermute_grad_v2")
def _unpermute_grad_v2(
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
    permuted_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _need(permuted_tokens is not None, "the rows are needed for the gradient of the weights")
    return _unpermute_grad(permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs)


@_named("npu::npu_rms_norm")
def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    _same_narrow("npu_rms_norm", input, gamma)
    _need(input.dim() >= 2 and gamma.shape == input.shape[-1:], "input of 2 to 8 dimensions, gamma of its last")
    rstd = (input.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


@_named("npu::npu_rms_norm_backward")
def _rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    _same_narrow("npu_rms_norm_backward", dy, input, gamma)
    normal, grad = input.float() * rstd, dy.float() * gamma.float()
    grad_input = rstd * (grad - normal * (grad * normal).mean(-1, keepdim=True))
    grad_gamma = (dy.float() * normal).flatten(0, -2).sum(0)
    return grad_input.to(input.dtype), grad_gamma


@_named("npu::npu_swiglu")
def _swiglu(input: Tensor, dim: int = -1) -> Tensor:
    _same_narrow("npu_swiglu", input)
    _need(input.numel() > 0, "nothing to do is not documented")
    gate, up = input.float().chunk(2, dim)
    return (F.silu(gate) * up).to(input.dtype)


@_named("npu::npu_swiglu_backward")
def _swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    _same_narrow("npu_swiglu_backward", grad_output, input)
    (gate, up), grad = input.float().chunk(2, dim), grad_output.float()
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad * up * slope, grad * gate * sigmoid], dim).to(input.dtype)


@_named("npu::npu_rotary_mul")
def _rotary(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    _same_narrow("npu_rotary_mul", input, r1, r2)
    _need(rotate is None and input.dim() == 4 and r1.shape == r2.shape, "four dimensions, both tables alike")
    _need(rotary_mode in ("half", "interleave"), f"rotary_mode {rotary_mode}")
    B, S, N, D = input.shape
    _need(D < 896 and D % 2 == 0 and B < 1000 and N < 1000, f"limits of {tuple(input.shape)}")
    tables = {(1, S, 1, D)}
    if rotary_mode == "half":
        tables |= {(B, S, 1, D), (B, S, N, D)}
    else:
        _need(B * N < 1000, "B * N < 1000")
    _need(tuple(r1.shape) in tables, f"tables {tuple(r1.shape)} for {tuple(input.shape)}")
    x = input.float()
    if rotary_mode == "half":
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * r1.float() + turned * r2.float()).to(input.dtype)


def _hidden(q: Tensor, k: Tensor, atten_mask: Tensor | None, sparse_mode: int, pre: int, after: int) -> Tensor:
    """Which keys a query does not see: bool, to be broadcast to (B, N, S, L)."""
    B, S, N, _ = q.shape
    L = k.shape[1]
    if atten_mask is None:
        _need(sparse_mode == 0, f"sparse_mode {sparse_mode} without its mask hides nothing")
        return torch.zeros(1, 1, S, L, dtype=torch.bool)
    _need(atten_mask.dtype in (torch.bool, torch.uint8), "atten_mask: bool or uint8")
    if sparse_mode == 1:
        shapes = {(S, L), (1, 1, S, L), (B, 1, S, L), (B, N, S, L)}
        _need(tuple(atten_mask.shape) in shapes, f"atten_mask {tuple(atten_mask.shape)}, not one of {shapes}")
        hidden = atten_mask.bool().expand(B, 1 if atten_mask.dim() == 2 else atten_mask.shape[1], S, L)
    else:
        _need(sparse_mode in (2, 3, 4), f"sparse_mode {sparse_mode} has no reference")
        future = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        _need(atten_mask.shape == future.shape and bool((atten_mask.bool() == future).all()), "the compressed mask")
        shift = 0 if sparse_mode == 2 else L - S  # from the upper left corner, or from the lower right one
        distance = torch.arange(L) - torch.arange(S)[:, None] - shift
        hidden = distance > 0 if sparse_mode != 4 else (distance > after) | (distance < -pre)
        hidden = hidden[None, None]
    _need(not bool(hidden.all(-1).any()), "a query that sees no key")
    return hidden


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """(B, N, S, L) in fp32."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return (torch.einsum("bsnd,blnd->bnsl", q.float(), k.float()) * scale).masked_fill(hidden, -torch.inf)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, head_num: int, input_layout: str, others: dict) -> None:
    allowed = {"keep_prob": 1.0, "seed": 0, "offset": 0, "numels": 0, "inner_precise": 0}
    allowed |= {"gen_mask_parallel": True, "sync": False, "softmax_layout": ""}
    for name, value in others.items():
        _need(value is None or value == allowed.get(name), f"{name}={value} has no reference")
    _same_narrow("npu_fusion_attention", q, k, v)
    _need(input_layout == "BSND" and q.dim() == k.dim() == v.dim() == 4, f"layout {input_layout} has no reference")
    _need(k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3], "shapes of query, key, value")
    _need(head_num == q.shape[2] <= 256 and q.shape[2] % k.shape[2] == 0, "heads")
    _need(q.shape[3] <= 768, "a head of more than 768")


@_named("npu::npu_fusion_attention")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: None = None,
    padding_mask: None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: None = None,
    actual_seq_qlen: None = None,
    actual_seq_kvlen: None = None,
    sparse_mode: int = 0,
    **others: Any,
) -> tuple[Any, ...]:
    others |= {"pse": pse, "padding_mask": padding_mask, "keep_prob": keep_prob, "prefix": prefix}
    others |= {"actual_seq_qlen": actual_seq_qlen, "actual_seq_kvlen": actual_seq_kvlen}
    _check_attention(query, key, value, head_num, input_layout, others | {"inner_precise": inner_precise})
    hidden = _hidden(query, key, atten_mask, sparse_mode, pre_tockens, next_tockens)
    scores = _scores(query, key, hidden, scale)
    v = value.repeat_interleave(query.shape[2] // value.shape[2], 2)
    result = torch.einsum("bnsl,blnw->bsnw", scores.softmax(-1), v.float())
    largest = scores.amax(-1, keepdim=True)
    total = (scores - largest).exp().sum(-1, keepdim=True)
    kept = tuple(x.expand(*x.shape[:3], 8).contiguous() for x in (largest, total))  # as wide as the operator's own
    return result.to(query.dtype), *kept, query.new_empty(0), 0, 0, 0


@_named("npu::npu_fusion_attention_grad")
def _attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale_value: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    sparse_mode: int = 0,
    **others: Any,
) -> tuple[Tensor, ...]:
    _check_attention(query, key, value, head_num, input_layout, others)
    _need(softmax_max is not None and softmax_sum is not None and attention_in is not None, "the forward's results")
    hidden = _hidden(query, key, atten_mask, sparse_mode, pre_tockens, next_tockens)
    scores = _scores(query, key, hidden, scale_value)
    probabilities = (scores - softmax_max[..., :1]).exp() / softmax_sum[..., :1]
    group = query.shape[2] // key.shape[2]
    k, v = (x.float().repeat_interleave(group, 2) for x in (key, value))
    grad = dy.float()
    grad_v = torch.einsum("bnsl,bsnw->blnw", probabilities, grad)
    grad_probabilities = torch.einsum("bsnw,blnw->bnsl", grad, v)
    lost = (probabilities * grad_probabilities).sum(-1, keepdim=True)  # the same as dy times attention_in
    grad_scores = probabilities * (grad_probabilities - lost) * scale_value
    grad_q = torch.einsum("bnsl,blnd->bsnd", grad_scores, k)
    grad_k = torch.einsum("bnsl,bsnd->blnd", grad_scores, query.float())
    grad_k, grad_v = (x.unflatten(2, (-1, group)).sum(3) for x in (grad_k, grad_v))
    results = (x.to(query.dtype) for x in (grad_q, grad_k, grad_v))
    return *results, query.new_empty(0), query.new_empty(0)
