"""The head and its loss in one function, a chunk of tokens at a time: all logits never exist at once.

Shape suffixes: T tokens, H hidden, V vocabulary, C tokens of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends.functions.rows import accumulation_dtype

IGNORED = -100
_CHUNK_BYTES = 32 * 2**20  # of wide logits


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient with respect to the logits is known in the forward, so the backward only scales.

    softmax(z) - onehot(label) is formed in place of the logits of a chunk while they are there.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        T, V = hidden_TH.shape[0], weight_VH.shape[0]
        wide = accumulation_dtype(hidden_TH.dtype)
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        weight_wide = weight_VH.to(wide)
        loss = torch.zeros((), dtype=wide, device=hidden_TH.device)
        grad_hidden = torch.empty_like(hidden_TH) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_wide) if wants_weight else None
        chunk = max(1, _CHUNK_BYTES // (V * wide.itemsize))
        for start in range(0, T, chunk):
            rows = slice(start, min(start + chunk, T))
            hidden_CH, labels_C = hidden_TH[rows].to(wide), labels_T[rows]
            kept_C1 = (labels_C != IGNORED).unsqueeze(1)
            target_C1 = labels_C.clamp(min=0).unsqueeze(1)
            logits_CV = hidden_CH @ weight_wide.T
            log_sum_C1 = torch.logsumexp(logits_CV, 1, keepdim=True)
            loss += ((log_sum_C1 - logits_CV.gather(1, target_C1)) * kept_C1).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad_CV = logits_CV.sub_(log_sum_C1).exp_()
            grad_CV.scatter_add_(1, target_C1, torch.full_like(log_sum_C1, -1.0))
            grad_CV *= kept_C1
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_CV @ weight_wide).to(hidden_TH.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad_CV.T, hidden_CH)
        count = (labels_T != IGNORED).sum()
        ctx.grads = grad_hidden, grad_weight, weight_VH.dtype
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_count: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight, weight_dtype = ctx.grads
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(weight_dtype)
        return grad_hidden, grad_weight, None


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """See :meth:`backends.operations.Operations.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, labels_T)
