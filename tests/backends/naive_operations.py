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


def swiglu(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    return gate / (1 + (-gate).exp()) * up


def rotary(x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
    half = cos_BSR.shape[-1]
    columns = list(x_BSND.unbind(-1))
    for r in range(half):
        i, j = (2 * r, 2 * r + 1) if interleaved else (r, r + half)
        cos, sin = cos_BSR[..., r, None], sin_BSR[..., r, None]
        columns[i], columns[j] = columns[i] * cos - columns[j] * sin, columns[j] * cos + columns[i] * sin
    return torch.stack(columns, -1)


def attention(q_BSND: Tensor, k_BSMD: Tensor, v_BSMW: Tensor, scale: float, documents_BS: Tensor | None) -> Tensor:
    group = q_BSND.shape[2] // k_BSMD.shape[2]
    k, v = k_BSMD.repeat_interleave(group, 2), v_BSMW.repeat_interleave(group, 2)
    scores = torch.einsum("bsnd,btnd->bnst", q_BSND, k) * scale
    S = scores.shape[-1]
    seen = torch.ones(S, S, dtype=torch.bool).tril()
    if documents_BS is not None:
        seen = seen & (documents_BS[:, :, None] == documents_BS[:, None, :]).unsqueeze(1)
    return torch.einsum("bnst,btnw->bsnw", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    log_probabilities = (hidden_TH @ weight_VH.T).log_softmax(-1)
    total = 0 * (hidden_TH.sum() + weight_VH.sum())
    for row, label in zip(log_probabilities, labels_T.tolist(), strict=True):
        if label != -100:
            total = total - row[label]
    return total
