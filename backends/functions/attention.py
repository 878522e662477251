"""Causal attention by blocks of queries on plain matrix multiplies, for processors without a fused kernel.

torch's flash attention on the CPU repeats grouped heads, falls back when the value head size is not the key's, and
in bf16 without bf16 hardware multiplies at a tenth of the speed. Here a block of queries meets only the keys that it
may see, the query heads of a group are rows of one matrix, and everything is computed in fp32 (fp64 for fp64) and
rounded once. The backward computes the probabilities again, so that memory grows with the sequence, not its square.

Shape suffixes: B batch, S sequence, N query heads, M key/value heads, D query/key head size, W value head size,
C queries of a block, Q rows of a block (C times the N/M query heads of a group), L keys that a block sees,
A = B·M matrices of a batched multiply.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends.functions.rows import accumulation_dtype

_BLOCK = 128  # queries: large enough for the multiply, small enough to skip most of the masked half
_SCORES = 2**21  # elements of a block's scores, over as many sequences as fit: few calls, and still near the caches


class _Block(NamedTuple):
    """Positions ``queries`` of some sequences, the keys they may see, and -inf where one may not.

    ``bias`` (B or 1, C, ·) is added to the scores of the last keys, as many as it has columns.
    """

    queries: slice
    keys: slice
    bias: Tensor


def _sequences(q_BSND: Tensor) -> Iterator[slice]:
    """The batch in parts that are worked on together."""
    B, S, N, _ = q_BSND.shape
    step = max(1, _SCORES // max(1, N * S * min(S, _BLOCK)))
    for start in range(0, B, step):
        yield slice(start, start + step)


def _blocks(S: int, documents_BS: Optional[Tensor], dtype: torch.dtype) -> Iterator[_Block]:
    """The blocks of sequences, the last first."""
    future_1CC = torch.full((1, _BLOCK, _BLOCK), float("-inf"), dtype=dtype).triu_(1)
    for start in reversed(range(0, S, _BLOCK)):
        end = min(start + _BLOCK, S)
        bias = future_1CC[:, : end - start, : end - start]
        first = 0
        if documents_BS is not None:
            other_BCL = documents_BS[:, None, :end] != documents_BS[:, start:end, None]
            first = int((~other_BCL).any(0).any(0).int().argmax())  # no query of the block sees an earlier key
            other_BCL = other_BCL[..., first:]
            if other_BCL.any():
                whole = bias.new_zeros(other_BCL.shape).masked_fill_(other_BCL, float("-inf"))
                whole[..., start - first :] += bias
                bias = whole
        yield _Block(slice(start, end), slice(first, end), bias)


def _grouped(x_BCND: Tensor, M: int) -> Tensor:
    """(B, C, N, D) -> (A, Q, D), wide: rows run over the positions first, then the heads of a group."""
    B, C, N, D = x_BCND.shape
    rows = torch.empty(B, M, C, N // M, D, dtype=accumulation_dtype(x_BCND.dtype))
    return rows.copy_(x_BCND.unflatten(2, (M, N // M)).transpose(1, 2)).view(B * M, -1, D)


def _scatter_heads(rows_AQD: Tensor, into_BCND: Tensor) -> None:
    """Undo :func:`_grouped` into a slice of the result, rounding to its dtype."""
    B, C, N, D = into_BCND.shape
    M = rows_AQD.shape[0] // B
    into_BCND.view(B, C, M, N // M, D).copy_(rows_AQD.view(B, M, C, N // M, D).transpose(1, 2))


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * a @ b``: the multiply scales for nothing."""
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=scale)


def _probabilities(query_AQD: Tensor, key_ALD: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax over the keys that each query sees -> (A, Q, L)."""
    scores_AQL = _scaled_bmm(query_AQD, key_ALD.transpose(1, 2), scale)
    A, Q, L = scores_AQL.shape
    B, C, masked = bias.shape
    scores_AQL.view(B, A // B, C, Q // C, L)[..., L - masked :].add_(bias[:, None, :, None])
    return torch.softmax(scores_AQL, -1, out=scores_AQL)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BSND: Tensor, k_BSMD: Tensor, v_BSMW: Tensor, scale: float, documents_BS: Optional[Tensor]
    ) -> Tensor:
        (B, S, N, _), (M, W) = q_BSND.shape, v_BSMW.shape[2:]
        result = q_BSND.new_empty(B, S, N, W)
        for b in _sequences(q_BSND):
            key_ASD, value_ASW = _grouped(k_BSMD[b], M), _grouped(v_BSMW[b], M)
            for queries, keys, bias in _blocks(S, _of(documents_BS, b), key_ASD.dtype):
                query_AQD = _grouped(q_BSND[b, queries], M)
                probabilities = _probabilities(query_AQD, key_ASD[:, keys], bias, scale)
                _scatter_heads(torch.bmm(probabilities, value_ASW[:, keys]), result[b, queries])
        ctx.save_for_backward(q_BSND, k_BSMD, v_BSMW, documents_BS)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSNW: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BSND, k_BSMD, v_BSMW, documents_BS = ctx.saved_tensors
        scale, S, M = ctx.scale, q_BSND.shape[1], k_BSMD.shape[2]
        grad_q = torch.empty(q_BSND.shape, dtype=q_BSND.dtype)
        grad_k, grad_v = torch.empty(k_BSMD.shape, dtype=k_BSMD.dtype), torch.empty(v_BSMW.shape, dtype=v_BSMW.dtype)
        for b in _sequences(q_BSND):
            key_ASD, value_ASW = _grouped(k_BSMD[b], M), _grouped(v_BSMW[b], M)
            grad_key, grad_value = torch.zeros_like(key_ASD), torch.zeros_like(value_ASW)
            for queries, keys, bias in _blocks(S, _of(documents_BS, b), key_ASD.dtype):
                query_AQD, grad_AQW = _grouped(q_BSND[b, queries], M), _grouped(grad_BSNW[b, queries], M)
                probabilities = _probabilities(query_AQD, key_ASD[:, keys], bias, scale)
                # bmm into a slice would run head by head: its result must be contiguous.
                grad_value[:, keys] += torch.bmm(probabilities.transpose(1, 2), grad_AQW)
                grad_scores = torch.bmm(grad_AQW, value_ASW[:, keys].transpose(1, 2))
                torch.ops.aten._softmax_backward_data.out(
                    grad_scores, probabilities, -1, grad_scores.dtype, grad_input=grad_scores
                )
                grad_key[:, keys] += _scaled_bmm(grad_scores.transpose(1, 2), query_AQD, scale)
                _scatter_heads(_scaled_bmm(grad_scores, key_ASD[:, keys], scale), grad_q[b, queries])
            _scatter_heads(grad_key, grad_k[b])
            _scatter_heads(grad_value, grad_v[b])
        return grad_q, grad_k, grad_v, None, None


def _of(documents_BS: Optional[Tensor], sequences: slice) -> Optional[Tensor]:
    return None if documents_BS is None else documents_BS[sequences]


def attention(q_BSND: Tensor, k_BSMD: Tensor, v_BSMW: Tensor, scale: float, documents_BS: Optional[Tensor]) -> Tensor:
    """See :meth:`backends.operations.Operations.attention`."""
    return _Attention.apply(q_BSND, k_BSMD, v_BSMW, scale, documents_BS)
