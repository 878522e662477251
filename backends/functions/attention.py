"""Causal attention by blocks of queries on plain matrix multiplies, for processors without a fused kernel.

torch's flash attention on the CPU repeats grouped heads, falls back when the value head size is not the key's, and
in bf16 without bf16 hardware multiplies at a tenth of the speed. Here a block of queries meets only the keys that it
may see, the query heads of a group are rows of one matrix, and everything is computed in fp32 (fp64 for fp64) and
rounded once. The backward computes the probabilities again, so that memory grows with the sequence, not its square.

Shape suffixes: B batch, S sequence, N query heads, M key/value heads, D query/key head size, W value head size,
C queries of a block, Q rows of a block (C times the N/M query heads of a group), L keys that a block sees.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends.functions.rows import accumulation_dtype

_BLOCK = 128  # queries: large enough for the multiply, small enough to skip most of the masked half


class _Block(NamedTuple):
    """Positions ``queries`` of one sequence, the keys they may see, and -inf where one may not.

    ``bias`` (C, ·) is added to the scores of the last keys, as many as it has columns.
    """

    queries: slice
    keys: slice
    bias: Tensor


def _blocks(S: int, document_S: Optional[Tensor], dtype: torch.dtype) -> Iterator[_Block]:
    """The blocks of one sequence, the last first."""
    future_CC = torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=dtype).triu_(1)
    for start in reversed(range(0, S, _BLOCK)):
        end = min(start + _BLOCK, S)
        bias = future_CC[: end - start, : end - start]
        first = 0
        if document_S is not None:
            other_CL = document_S[:end] != document_S[start:end].unsqueeze(1)
            first = int((~other_CL).any(0).int().argmax())  # no query of the block sees an earlier key
            other_CL = other_CL[:, first:]
            if other_CL.any():
                whole = bias.new_zeros(other_CL.shape).masked_fill_(other_CL, float("-inf"))
                whole[:, start - first :] += bias
                bias = whole
        yield _Block(slice(start, end), slice(first, end), bias)


def _grouped(x_CND: Tensor, M: int, scale: float = 1.0) -> Tensor:
    """(C, N, D) -> (M, Q, D), wide and scaled: rows run over the positions first, then the heads of a group."""
    wide = accumulation_dtype(x_CND.dtype)
    C, N, D = x_CND.shape
    x = x_CND.view(C, M, N // M, D).transpose(0, 1)
    x = x.to(wide) * scale if scale != 1.0 else x.to(wide)
    return x.reshape(M, -1, D)


def _scatter_heads(rows_MQD: Tensor, into_CND: Tensor) -> None:
    """Undo :func:`_grouped` into a slice of the result, rounding to its dtype."""
    C, N, D = into_CND.shape
    M = rows_MQD.shape[0]
    into_CND.view(C, M, N // M, D).copy_(rows_MQD.view(M, C, N // M, D).transpose(0, 1))


def _probabilities(query_MQD: Tensor, key_MLD: Tensor, bias: Tensor) -> Tensor:
    """Softmax over the keys that each query sees -> (M, Q, L)."""
    scores_MQL = torch.bmm(query_MQD, key_MLD.transpose(1, 2))
    M, Q, L = scores_MQL.shape
    C, masked = bias.shape
    scores_MQL.view(M, C, Q // C, L)[..., L - masked :].add_(bias.unsqueeze(1))
    return torch.softmax(scores_MQL, -1, out=scores_MQL)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BSND: Tensor, k_BSMD: Tensor, v_BSMW: Tensor, scale: float, documents_BS: Optional[Tensor]
    ) -> Tensor:
        (B, S, N, _), (M, W) = q_BSND.shape, v_BSMW.shape[2:]
        result = q_BSND.new_empty(B, S, N, W)
        for b in range(B):
            key_MSD, value_MSW = _grouped(k_BSMD[b], M), _grouped(v_BSMW[b], M)
            document_S = None if documents_BS is None else documents_BS[b]
            for queries, keys, bias in _blocks(S, document_S, key_MSD.dtype):
                query_MQD = _grouped(q_BSND[b, queries], M, scale)
                probabilities = _probabilities(query_MQD, key_MSD[:, keys], bias)
                _scatter_heads(torch.bmm(probabilities, value_MSW[:, keys]), result[b, queries])
        ctx.save_for_backward(q_BSND, k_BSMD, v_BSMW, documents_BS)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSNW: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BSND, k_BSMD, v_BSMW, documents_BS = ctx.saved_tensors
        (B, S), M = q_BSND.shape[:2], k_BSMD.shape[2]
        grad_q = torch.empty(q_BSND.shape, dtype=q_BSND.dtype)
        grad_k, grad_v = torch.empty(k_BSMD.shape, dtype=k_BSMD.dtype), torch.empty(v_BSMW.shape, dtype=v_BSMW.dtype)
        for b in range(B):
            key_MSD, value_MSW = _grouped(k_BSMD[b], M), _grouped(v_BSMW[b], M)
            grad_key = torch.zeros(key_MSD.shape, dtype=key_MSD.dtype)
            grad_value = torch.zeros(value_MSW.shape, dtype=key_MSD.dtype)
            document_S = None if documents_BS is None else documents_BS[b]
            for queries, keys, bias in _blocks(S, document_S, key_MSD.dtype):
                query_MQD, grad_MQW = _grouped(q_BSND[b, queries], M, ctx.scale), _grouped(grad_BSNW[b, queries], M)
                probabilities = _probabilities(query_MQD, key_MSD[:, keys], bias)
                # bmm into a slice would run head by head: its result must be contiguous.
                grad_value[:, keys] += torch.bmm(probabilities.transpose(1, 2), grad_MQW)
                grad_scores = torch.bmm(grad_MQW, value_MSW[:, keys].transpose(1, 2))
                torch.ops.aten._softmax_backward_data.out(
                    grad_scores, probabilities, -1, grad_scores.dtype, grad_input=grad_scores
                )
                grad_key[:, keys] += torch.bmm(grad_scores.transpose(1, 2), query_MQD)
                grad_query = torch.bmm(grad_scores, key_MSD[:, keys])
                _scatter_heads(grad_query.mul_(ctx.scale), grad_q[b, queries])
            _scatter_heads(grad_key, grad_k[b])
            _scatter_heads(grad_value, grad_v[b])
        return grad_q, grad_k, grad_v, None, None


def attention(q_BSND: Tensor, k_BSMD: Tensor, v_BSMW: Tensor, scale: float, documents_BS: Optional[Tensor]) -> Tensor:
    """See :meth:`backends.operations.Operations.attention`."""
    return _Attention.apply(q_BSND, k_BSMD, v_BSMW, scale, documents_BS)
