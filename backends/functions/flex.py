"""Causal attention with documents, a window or sinks on torch's flex_attention, which compiles a kernel for the mask.

The flash kernels behind ``F.scaled_dot_product_attention`` take no mask. With one, torch reads a tensor of all pairs
of positions and multiplies what is masked as well. flex_attention is told which blocks of 128 × 128 pairs have
nothing to see, skips them, and evaluates the mask inside the others.

Shape suffixes as in ``backends/operations.py``.
"""

from functools import lru_cache
from typing import Optional

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from backends.functions.compiled import Compiled, compiles_on

_SHORTEST = 128  # positions: below a block there is nothing to skip

compiled_attention = Compiled(flex_attention)

# The layers of a micro-batch are given the same tensor of documents. What is kept goes with it.
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def serves(q_BSND: Tensor, k_BLMD: Tensor) -> bool:
    """Whether :func:`attention` takes these: training in 16 bits, on a device that flex_attention has kernels for.

    In fp32 its kernels hold too little of a block. Generation has another length at each step, and one compiled
    kernel for each.
    """
    (S, D), L = (q_BSND.shape[1], q_BSND.shape[3]), k_BLMD.shape[1]
    return compiles_on(q_BSND) and q_BSND.dtype.itemsize == 2 and S == L >= _SHORTEST and D >= 16


def attention(
    q_BSND: Tensor,
    k_BLMD: Tensor,
    v_BLMW: Tensor,
    scale: float,
    documents_BL: Optional[Tensor],
    window: int,
    sinks_N: Optional[Tensor],
) -> Tensor:
    """See :meth:`backends.operations.Operations.attention`; with as many queries as keys.

    A sink s takes part in the softmax with weight e^s and no value. With z = logsumexp(scores), the sum over the keys
    has the share e^z / (e^z + e^s) = sigmoid(z - s) of the softmax. So the result is the one without sinks times that
    share, and autograd brings the gradients of q, k and s through z.

    Raises:
        CannotCompile: the kernel cannot be had.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSND, k_BLMD, v_BLMW))
    mask = _block_mask(q.shape[2], documents_BL, window, q.device)
    y_BNSW, more = compiled_attention(
        q,
        k,
        v,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=sinks_N is not None),
    )
    if sinks_N is not None:
        share_BNS = torch.sigmoid(more.lse - sinks_N.float()[:, None])
        y_BNSW = (y_BNSW * share_BNS.unsqueeze(-1)).to(y_BNSW.dtype)
    return y_BNSW.transpose(1, 2)


def _block_mask(S: int, documents_BL: Optional[Tensor], window: int, device: torch.device) -> BlockMask:
    """Which blocks of pairs are seen, made once for the layers that share it."""
    window = window if window < S else 0
    if documents_BL is None:
        return _without_documents(S, window, device)
    made = _masks.setdefault(documents_BL, {})
    key = window, documents_BL._version
    if key not in made:
        made[key] = _make(S, documents_BL.detach(), window, device)  # not the key itself, which would live for ever
    return made[key]


@lru_cache(maxsize=16)
def _without_documents(S: int, window: int, device: torch.device) -> BlockMask:
    return _make(S, None, window, device)


def _make(S: int, documents_BL: Optional[Tensor], window: int, device: torch.device) -> BlockMask:
    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = key <= query
        if window:
            visible = visible & (key > query - window)
        if documents_BL is not None:
            visible = visible & (documents_BL[b, query] == documents_BL[b, key])
        return visible

    batch = None if documents_BL is None else documents_BL.shape[0]
    return create_block_mask(seen, batch, None, S, S, device=device)
