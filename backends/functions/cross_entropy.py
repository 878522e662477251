"""The head and its loss in one function, a chunk of tokens at a time: all logits never exist at once.

Shape suffixes: T tokens, H hidden, V vocabulary, C tokens of a chunk.
"""

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backends.functions.matmul import WIDE_RESULTS, product
from backends.functions.rows import accumulation_dtype
from backends.operations import IGNORED
from backends.weight_gradients import accumulate, deliver

_CHUNK_BYTES = 32 * 2**20  # of wide logits: enough rows for the multiply, few enough to stay near the caches


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient with respect to the logits is known in the forward, so the backward only scales.

    softmax(z) - onehot(label) takes the place of a chunk's logits while they are there.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        dtype, wide = hidden_TH.dtype, accumulation_dtype(hidden_TH.dtype)
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        device = hidden_TH.device
        # On the CPU the weight is widened once here, and not for each chunk.
        weight = weight_VH if device.type in WIDE_RESULTS else weight_VH.to(wide)
        loss = torch.zeros((), dtype=wide, device=device)
        grad_hidden = torch.empty_like(hidden_TH) if wants_hidden else None
        grad_weight = torch.zeros(weight_VH.shape, dtype=wide, device=device) if wants_weight else None
        chunk = max(1, _CHUNK_BYTES // (weight_VH.shape[0] * wide.itemsize))
        for start in range(0, hidden_TH.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_CH, labels_C = hidden_TH[rows].to(weight.dtype), labels_T[rows]
            kept_C1 = (labels_C != IGNORED).unsqueeze(1)
            target_C1 = labels_C.clamp(min=0).unsqueeze(1)
            logits_CV = product(hidden_CH, weight.T, wide, wide)
            target_logit_C1 = logits_CV.gather(1, target_C1)
            largest_C1 = logits_CV.amax(1, keepdim=True)
            # softmax is one fused pass, and its largest entry is 1 / sum(exp(z - max z)): no second exponential.
            grad_CV = torch.softmax(logits_CV, 1, out=logits_CV)
            log_sum_C1 = largest_C1 - grad_CV.amax(1, keepdim=True).log_()
            loss += ((log_sum_C1 - target_logit_C1) * kept_C1).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad_CV.scatter_(1, target_C1, grad_CV.gather(1, target_C1) - 1)  # scatter_add is not deterministic on CUDA
            grad_CV = grad_CV.to(weight.dtype)
            # Ignored tokens are masked in the narrow operands and not in all of grad_CV.
            if grad_hidden is not None:
                torch.mul(product(grad_CV, weight, wide, wide), kept_C1, out=grad_hidden[rows])
            if grad_weight is not None:
                hidden_CH = hidden_CH * kept_C1
                if weight.dtype == wide:
                    grad_weight.addmm_(grad_CV.T, hidden_CH)
                else:
                    grad_weight += product(grad_CV.T, hidden_CH, wide, wide)
        count = (labels_T != IGNORED).sum()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype, ctx.weight = dtype, weight_VH
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_count: Tensor) -> tuple[Optional[Tensor], Optional[Tensor], None]:
        hidden, weight = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if hidden is not None:
            grad_hidden = torch.mul(hidden, grad_loss).to(ctx.dtype)
        if weight is not None:

            def write(out_VH: Tensor, beta: int) -> None:
                if out_VH.dtype == weight.dtype and not beta:
                    torch.mul(weight, grad_loss, out=out_VH)
                else:
                    accumulate(out_VH, weight * grad_loss, beta)

            grad_weight = deliver(ctx.weight, write)
        return grad_hidden, grad_weight, None


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """See :meth:`backends.operations.Operations.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, labels_T)
