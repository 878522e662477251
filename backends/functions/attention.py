"""Causal attention by blocks of queries on plain matrix multiplies, for processors without a fused kernel.

torch's flash attention on the CPU repeats grouped heads, falls back when the value head size is not the key's, and
in bf16 without bf16 hardware multiplies at a tenth of the speed. Here a block of queries meets only the keys that it
may see, the query heads of a group are rows of one matrix, and everything is computed in fp32 (fp64 for fp64) and
rounded once. The backward computes the probabilities again, so that memory grows with the sequence, not its square.

Shape suffixes: B batch, S queries of a sequence, L its keys, N query heads, M key/value heads,
D query/key head size, W value head size,
C queries of a block, Q rows of a block (C times the N/M query heads of a group), K keys that a block sees,
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


def _sequences(q_BSND: Tensor, L: int) -> Iterator[slice]:
    """The batch in parts that are worked on together."""
    B, S, N, _ = q_BSND.shape
    step = max(1, _SCORES // max(1, N * L * min(S, _BLOCK)))
    for start in range(0, B, step):
        yield slice(start, start + step)


def _blocks(S: int, L: int, documents_BL: Optional[Tensor], window: int, like: Tensor) -> Iterator[_Block]:
    """The blocks of sequences, the last first; biases are made with the dtype and on the device of ``like``."""
    future_1CC = like.new_full((1, _BLOCK, _BLOCK), float("-inf")).triu_(1)
    for start in reversed(range(0, S, _BLOCK)):
        end = min(start + _BLOCK, S)
        queries = slice(start, end)
        at, last = start + L - S, end + L - S  # the positions of the block's queries among the keys
        bias = future_1CC[:, : end - start, : end - start]
        first = max(0, at - window + 1) if window else 0
        hidden_BCK = None
        if window and last - first > window:
            positions = torch.arange(first, last, device=like.device)
            hidden_BCK = (positions <= positions[at - first :, None] - window).unsqueeze(0)
        if documents_BL is not None:
            other_BCK = documents_BL[:, None, first:last] != documents_BL[:, at:last, None]
            unseen = int((~other_BCK).any(0).any(0).int().argmax())  # no query of the block sees an earlier key
            first, other_BCK = first + unseen, other_BCK[..., unseen:]
            if hidden_BCK is not None:
                hidden_BCK = hidden_BCK[..., unseen:] | other_BCK
            elif other_BCK.any():
                hidden_BCK = other_BCK
        if hidden_BCK is not None:
            whole = like.new_zeros(hidden_BCK.shape).masked_fill_(hidden_BCK, float("-inf"))
            whole[..., at - first :] += bias
            bias = whole
        yield _Block(queries, slice(first, last), bias)


def _grouped(x_BCND: Tensor, M: int) -> Tensor:
    """(B, C, N, D) -> (A, Q, D), wide: rows run over the positions first, then the heads of a group."""
    B, C, N, D = x_BCND.shape
    rows = x_BCND.new_empty(B, M, C, N // M, D, dtype=accumulation_dtype(x_BCND.dtype))
    return rows.copy_(x_BCND.unflatten(2, (M, N // M)).transpose(1, 2)).view(B * M, -1, D)


def _scatter_heads(rows_AQD: Tensor, into_BCND: Tensor) -> None:
    """Undo :func:`_grouped` into a slice of the result, rounding to its dtype."""
    B, C, N, D = into_BCND.shape
    M = rows_AQD.shape[0] // B
    into_BCND.view(B, C, M, N // M, D).copy_(rows_AQD.view(B, M, C, N // M, D).transpose(1, 2))


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * a @ b``: the multiply scales for nothing."""
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=scale)


def _sinks_of(sinks_N: Tensor, part_BC: torch.Size, M: int) -> Tensor:
    """The sink of each row of a block of B sequences and C queries -> (A, Q, 1), in the order of :func:`_grouped`."""
    B, C = part_BC
    return sinks_N.view(1, M, 1, -1).expand(B, M, C, -1).reshape(B * M, -1, 1)


def _probabilities(
    query_AQD: Tensor, key_AKD: Tensor, bias: Tensor, scale: float, sink_AQ1: Optional[Tensor]
) -> tuple[Tensor, Optional[Tensor]]:
    """Softmax over the keys that each query sees -> (A, Q, K), and the sink's share of it -> (A, Q, 1)."""
    scores_AQK = _scaled_bmm(query_AQD, key_AKD.transpose(1, 2), scale)
    A, Q, K = scores_AQK.shape
    B, C, masked = bias.shape
    scores_AQK.view(B, A // B, C, Q // C, K)[..., K - masked :].add_(bias[:, None, :, None])
    if sink_AQ1 is None:
        return torch.softmax(scores_AQK, -1, out=scores_AQK), None
    total_AQ1 = torch.logaddexp(scores_AQK.logsumexp(-1, keepdim=True), sink_AQ1)
    return scores_AQK.sub_(total_AQ1).exp_(), (sink_AQ1 - total_AQ1).exp_()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSND: Tensor,
        k_BLMD: Tensor,
        v_BLMW: Tensor,
        sinks_N: Optional[Tensor],
        scale: float,
        documents_BL: Optional[Tensor],
        window: int,
    ) -> Tensor:
        (B, S, N, _), (L, M, W) = q_BSND.shape, v_BLMW.shape[1:]
        result = q_BSND.new_empty(B, S, N, W)
        sinks = None if sinks_N is None else sinks_N.to(accumulation_dtype(q_BSND.dtype))
        for b in _sequences(q_BSND, L):
            key_ALD, value_ALW = _grouped(k_BLMD[b], M), _grouped(v_BLMW[b], M)
            for queries, keys, bias in _blocks(S, L, _of(documents_BL, b), window, key_ALD):
                part_BC = q_BSND[b, queries].shape[:2]
                sink = None if sinks is None else _sinks_of(sinks, part_BC, M)
                query_AQD = _grouped(q_BSND[b, queries], M)
                probabilities, _ = _probabilities(query_AQD, key_ALD[:, keys], bias, scale, sink)
                _scatter_heads(torch.bmm(probabilities, value_ALW[:, keys]), result[b, queries])
        ctx.save_for_backward(q_BSND, k_BLMD, v_BLMW, sinks_N, documents_BL)
        ctx.scale, ctx.window = scale, window
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSNW: Tensor) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor], None, None, None]:
        q_BSND, k_BLMD, v_BLMW, sinks_N, documents_BL = ctx.saved_tensors
        scale, S, (L, M) = ctx.scale, q_BSND.shape[1], k_BLMD.shape[1:3]
        grad_q, grad_k, grad_v = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BSND, k_BLMD, v_BLMW)
        )
        sinks = None if sinks_N is None else sinks_N.to(accumulation_dtype(q_BSND.dtype))
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        for b in _sequences(q_BSND, L):
            key_ALD, value_ALW = _grouped(k_BLMD[b], M), _grouped(v_BLMW[b], M)
            grad_key, grad_value = torch.zeros_like(key_ALD), torch.zeros_like(value_ALW)
            for queries, keys, bias in _blocks(S, L, _of(documents_BL, b), ctx.window, key_ALD):
                query_AQD, grad_AQW = _grouped(q_BSND[b, queries], M), _grouped(grad_BSNW[b, queries], M)
                part_BC = grad_BSNW[b, queries].shape[:2]
                sink = None if sinks is None else _sinks_of(sinks, part_BC, M)
                probabilities, taken_AQ1 = _probabilities(query_AQD, key_ALD[:, keys], bias, scale, sink)
                # bmm into a slice would run head by head: its result must be contiguous.
                grad_value[:, keys] += torch.bmm(probabilities.transpose(1, 2), grad_AQW)
                grad_scores = torch.bmm(grad_AQW, value_ALW[:, keys].transpose(1, 2))
                if taken_AQ1 is not None and grad_sinks is not None:
                    lost_AQ = taken_AQ1.squeeze(2) * torch.linalg.vecdot(probabilities, grad_scores)
                    grad_sinks -= lost_AQ.view(part_BC[0], M, part_BC[1], -1).sum((0, 2)).flatten()
                # dS = P (dP - sum(P dP)), which holds for the keys' part of a softmax as well
                torch.ops.aten._softmax_backward_data.out(
                    grad_scores, probabilities, -1, grad_scores.dtype, grad_input=grad_scores
                )
                grad_key[:, keys] += _scaled_bmm(grad_scores.transpose(1, 2), query_AQD, scale)
                _scatter_heads(_scaled_bmm(grad_scores, key_ALD[:, keys], scale), grad_q[b, queries])
            _scatter_heads(grad_key, grad_k[b])
            _scatter_heads(grad_value, grad_v[b])
        if grad_sinks is not None and sinks_N is not None:
            grad_sinks = grad_sinks.to(sinks_N.dtype)
        return grad_q, grad_k, grad_v, grad_sinks, None, None, None


def _of(documents_BL: Optional[Tensor], sequences: slice) -> Optional[Tensor]:
    return None if documents_BL is None else documents_BL[sequences]


def attention(
    q_BSND: Tensor,
    k_BLMD: Tensor,
    v_BLMW: Tensor,
    scale: float,
    documents_BL: Optional[Tensor] = None,
    window: int = 0,
    sinks_N: Optional[Tensor] = None,
) -> Tensor:
    """See :meth:`backends.operations.Operations.attention`."""
    return _Attention.apply(q_BSND, k_BLMD, v_BLMW, sinks_N, scale, documents_BL, window)
