"""The textbook formula of each operation, with loops where that is plainest. Run in fp64 it is the reference."""

import torch
from torch import Tensor

from backends import ExpertOrder


def unpermute(y_PH: Tensor, order: ExpertOrder, weights_TK: Tensor) -> Tensor:
    tokens = []
    for t, row in enumerate(order.inverse_TK.tolist()):
        terms = [weights_TK[t, k] * y_PH[p] for k, p in enumerate(row) if p >= 0]
        tokens.append(sum(terms) if terms else 0 * (y_PH.sum(0) + weights_TK[t].sum()))
    return torch.stack(tokens) if tokens else y_PH[:0] + 0 * weights_TK.sum()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def add_expert_bias(y_PO: Tensor, bias_EO: Tensor, counts: list[int]) -> Tensor:
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = [y_PO[row] + bias_EO[expert] for row, expert in enumerate(experts)]
    return torch.stack(rows) if rows else y_PO + 0 * bias_EO.sum()


def swiglu(gate_up: Tensor, limit: float | None = None) -> Tensor:
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    if limit is None:
        return gate / (1 + (-gate).exp()) * up
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return gate / (1 + (-1.702 * gate).exp()) * (up + 1)


def rotary(x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
    half = cos_BSR.shape[-1]
    columns = list(x_BSND.unbind(-1))
    for r in range(half):
        i, j = (2 * r, 2 * r + 1) if interleaved else (r, r + half)
        cos, sin = cos_BSR[..., r, None], sin_BSR[..., r, None]
        columns[i], columns[j] = columns[i] * cos - columns[j] * sin, columns[j] * cos + columns[i] * sin
    return torch.stack(columns, -1)


def attention(
    q_BSND: Tensor,
    k_BLMD: Tensor,
    v_BLMW: Tensor,
    scale: float,
    documents_BL: Tensor | None,
    window: int = 0,
    sinks_N: Tensor | None = None,
) -> Tensor:
    (B, S, N), L = q_BSND.shape[:3], k_BLMD.shape[1]
    k, v = (x.repeat_interleave(N // x.shape[2], 2) for x in (k_BLMD, v_BLMW))
    scores = torch.einsum("bsnd,btnd->bnst", q_BSND, k) * scale
    seen = torch.zeros(B, S, L, dtype=torch.bool)
    for b in range(B):
        for s in range(S):
            for t in range(L):
                here = L - S + s
                same = documents_BL is None or documents_BL[b, here] == documents_BL[b, t]
                seen[b, s, t] = t <= here and same and (window == 0 or t > here - window)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    if sinks_N is not None:
        scores = torch.cat([scores, sinks_N.view(1, N, 1, 1).expand(B, N, S, 1)], -1)
    return torch.einsum("bnst,btnw->bsnw", scores.softmax(-1)[..., :L], v)


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    log_probabilities = (hidden_TH @ weight_VH.T).log_softmax(-1)
    total = 0 * (hidden_TH.sum() + weight_VH.sum())
    for row, label in zip(log_probabilities, labels_T.tolist(), strict=True):
        if label != -100:
            total = total - row[label]
    return total
