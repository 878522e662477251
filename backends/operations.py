"""The operations that a backend provides. ``backends/cpu.py`` defines each; the other backends are checked against it.

Shape suffixes: T tokens, K choices per token, P rows (at most T·K), E experts, H hidden, I input, O output,
B batch, S queries of a sequence, L its keys, N query heads, M key/value heads, D query/key head size,
W value head size, R rotated dimensions halved, V vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Optional

from torch import Tensor

IGNORED = -100  # label of a position that predicts nothing: torch's own choice


@dataclass(frozen=True)
class ExpertOrder:
    """Where each (token, choice) lies once the rows are sorted by expert.

    ``order_P`` is the flat index ``t * K + k`` behind each row, ``inverse_TK`` the row of each (t, k), -1 where it
    was dropped, and ``counts_E`` the rows of each expert. All int64, on the device of the choices.
    """

    order_P: Tensor
    inverse_TK: Tensor
    counts_E: Tensor

    @property
    def top_k(self) -> int:
        """K, the choices per token."""
        return int(self.inverse_TK.shape[1])

    @property
    def dropped(self) -> bool:
        """Whether some choice has no row. Read from the shapes: no device is waited for."""
        return self.order_P.numel() < self.inverse_TK.numel()


class Operations(ABC):
    """Differentiable to first order, exact under ``no_grad`` and activation checkpointing, on any floating dtype."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """``x @ weight.T + bias``: x (..., in), weight (out, in), bias (out,), all of one dtype -> (..., out)."""

    @abstractmethod
    def grouped_mm(self, x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert's weight times its own rows -> (T, O).

        The rows are sorted by expert; ``counts_E`` is int64 on the same device and sums to T. An expert may have
        no rows (its weight gradient is exactly 0) and T may be 0.
        """

    @abstractmethod
    def sort_by_expert(self, experts_TK: Tensor, num_experts: int, dropping: bool = True) -> ExpertOrder:
        """A stable sort of the choices by expert.

        An entry equal to ``num_experts`` is dropped and takes no row. ``dropping=False`` promises that there is
        none, which spares an accelerator a wait for the number of rows.
        """

    @abstractmethod
    def permute(self, x_TH: Tensor, order: ExpertOrder) -> Tensor:
        """The rows of x in expert order -> (P, H). The gradient of a token is the fp32 sum over its rows."""

    @abstractmethod
    def unpermute(self, y_PH: Tensor, order: ExpertOrder, weights_TK: Tensor) -> Tensor:
        """Sum of each token's rows times its weights -> (T, H), accumulated in fp32, in the dtype of y.

        Dropped choices add 0 and give their weight the gradient 0. The weights may have another dtype than y.
        """

    @abstractmethod
    def take_rows(self, x_PH: Tensor, index_P: Tensor, inverse_P: Tensor) -> Tensor:
        """``x_PH[index_P]`` for a permutation and its inverse; the gradient gathers by ``inverse_P``."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

        Computed in fp32 (fp64 for fp64); the result has the dtype of the weight.
        """

    @abstractmethod
    def add_expert_bias(self, y_PO: Tensor, bias_EO: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert's bias added to its own rows -> (P, O). The gradient of a bias is the fp32 sum over its rows.

        Rows and counts as in :meth:`grouped_mm`.
        """

    @abstractmethod
    def swiglu(self, gate_up: Tensor, limit: Optional[float] = None) -> Tensor:
        """``silu(first half) * second half``: (..., 2I) -> (..., I) (Shazeer 2020, arXiv 2002.05202).

        With a ``limit`` c, gpt-oss's clamped form: ``g * sigmoid(1.702 g) * (u + 1)``, where g is the first half, at
        most c, and u the second, between -c and c.
        """

    @abstractmethod
    def rotary(self, x_BSND: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, interleaved: bool) -> Tensor:
        """Rotate the leading 2R dimensions of each head, in fp32 (Su et al. 2021, arXiv 2104.09864, section 3.2).

        ``cos_BSR`` and ``sin_BSR`` hold one value for each of the R frequencies; their batch size may be 1.
        Dimension r pairs with r + R, or, ``interleaved``, 2r with 2r + 1. The layout stays. Tables get no gradient.
        """

    @abstractmethod
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
        """Causal softmax attention -> (B, S, N, W).

        Query head n reads key/value head ``n // (N / M)``. The queries are those of the last S of L positions.

        Args:
            documents_BL: any integers; a position sees only earlier positions with its own number.
            window: how many positions one sees, itself included; 0: all before it.
            sinks_N: for each head a logit that takes part in the softmax and has no value (gpt-oss).
        """

    @abstractmethod
    def linear_cross_entropy(self, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of ``hidden @ weight.T`` against the labels, without ever holding all logits.

        Returns:
            the sum over tokens whose label is not ``IGNORED`` (a scalar; logits and sum in fp32, fp64 for fp64), and
            the number of those tokens (int64 scalar on the same device).
        """
