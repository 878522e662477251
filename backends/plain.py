"""Every operation as its textbook formula, in torch operators that autograd differentiates.

As written they hold on to every intermediate result; compiled they do not (``backends/cuda.py``). In fp64 they say
what the definition (``backends/cpu.py``) must give, and in a narrow dtype what error is ordinary: each torch operator
rounds once. What the interface wants in fp32 is computed in fp32 here too.

Shape suffixes as in ``backends/operations.py``.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.functions.rows import accumulation_dtype
from backends.operations import IGNORED, ExpertOrder, Operations


class PlainOperations(Operations):
    """On any device and in any floating dtype."""

    def linear(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        return F.linear(x, weight, bias)

    def grouped_mm(self, x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        parts = x_TI.split(counts_E.tolist())
        return torch.cat([part @ weight.T for part, weight in zip(parts, weight_EOI.unbind(), strict=True)])

    def sort_by_expert(self, experts_TK: Tensor, num_experts: int, dropping: bool = True) -> ExpertOrder:
        flat = experts_TK.flatten().tolist()
        kept = [i for i in sorted(range(len(flat)), key=flat.__getitem__) if flat[i] < num_experts]
        row = {choice: p for p, choice in enumerate(kept)}
        counts = [0] * (num_experts + 1)
        for expert in flat:
            counts[expert] += 1

        def int64(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=experts_TK.device)

        inverse = int64([row.get(i, -1) for i in range(len(flat))])
        return ExpertOrder(int64(kept), inverse.view_as(experts_TK), int64(counts[:-1]))

    def permute(self, x_TH: Tensor, order: ExpertOrder) -> Tensor:
        return _wide(x_TH)[order.order_P // order.top_k].to(x_TH.dtype)

    def unpermute(self, y_PH: Tensor, order: ExpertOrder, weights_TK: Tensor) -> Tensor:
        with_nothing = torch.cat([y_PH, y_PH.new_zeros(1, y_PH.shape[1])])  # row -1, for what was dropped
        rows_TKH = _wide(with_nothing)[order.inverse_TK] * _wide(weights_TK)[..., None]
        return rows_TKH.sum(1).to(y_PH.dtype)

    def take_rows(self, x_PH: Tensor, index_P: Tensor, inverse_P: Tensor) -> Tensor:
        return x_PH[index_P]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_wide = _wide(x)
        return (x_wide / (x_wide.square().mean(-1, keepdim=True) + eps).sqrt() * _wide(weight)).to(weight.dtype)

    def add_expert_bias(self, y_PO: Tensor, bias_EO: Tensor, counts_E: Tensor) -> Tensor:
        return y_PO + torch.repeat_interleave(_wide(bias_EO), counts_E, dim=0).to(y_PO.dtype)

    def swiglu(self, gate_up: Tensor, limit: Optional[float] = None) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        if limit is None:
            return gate * torch.sigmoid(gate) * up
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    def rotary(self, x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
        half = cos_BSR.shape[-1]
        turned, rest = _wide(x_BSND)[..., : 2 * half], x_BSND[..., 2 * half :]
        cos, sin = (_wide(table).unsqueeze(2) for table in (cos_BSR, sin_BSR))
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
        pair = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return torch.cat([turned.to(x_BSND.dtype), rest], -1)

    def attention(
        self,
        q_BSND: Tensor,
        k_BLMD: Tensor,
        v_BLMW: Tensor,
        scale: float,
        documents_BL: Optional[Tensor] = None,
        window: int = 0,
        sinks_N: Optional[Tensor] = None,
    ) -> Tensor:
        (B, S, N), (L, M) = q_BSND.shape[:3], k_BLMD.shape[1:3]
        k_BLND, v_BLNW = (x.repeat_interleave(N // M, 2) for x in (k_BLMD, v_BLMW))
        scores_BNSL = torch.einsum("bsnd,blnd->bnsl", q_BSND, k_BLND) * scale
        keys = torch.arange(L, device=q_BSND.device)
        queries = keys[L - S :, None]
        seen = (keys <= queries) & (keys > queries - (window or L))
        if documents_BL is not None:
            seen = seen & (documents_BL[:, None, L - S :, None] == documents_BL[:, None, None, :])
        scores_BNSL = scores_BNSL.masked_fill(~seen, float("-inf"))
        if sinks_N is not None:
            scores_BNSL = torch.cat([scores_BNSL, sinks_N.view(1, N, 1, 1).expand(B, N, S, 1)], -1)
        return torch.einsum("bnsl,blnw->bsnw", scores_BNSL.softmax(-1)[..., :L], v_BLNW)

    def linear_cross_entropy(self, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        logits_TV = _wide(hidden_TH) @ _wide(weight_VH).T
        kept_T = labels_T != IGNORED
        chosen_T = logits_TV.log_softmax(-1).gather(1, labels_T.clamp(min=0)[:, None])[:, 0]
        return -(chosen_T * kept_T).sum(), kept_T.sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))
