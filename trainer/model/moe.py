"""The Mixture-of-Experts layer: router, dispatcher, stacked experts, shared expert.

Shapes: T tokens, P dispatched rows, H hidden, I expert hidden, E experts held here, K choices per token.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from backends.operations import Operations
from trainer.model.config import ModelConfig, MoEConfig
from trainer.model.context import Context, attach_loss
from trainer.model.linear import SwiGLU
from trainer.model.router import Router


class Dispatcher(Protocol):
    """Brings tokens to the experts that were chosen for them, and their results back.

    The one seam between the model and expert parallelism: `parallel` puts another one in its place.
    """

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Rows (P, H) sorted by local expert, tokens per local expert (E,), and what ``combine`` needs."""

    def combine(self, y_PH: Tensor, state: Any) -> Tensor:
        """Weighted sum (T, H) of each token's K results; a dropped choice adds nothing."""


class LocalDispatcher:
    """Every expert lives here: a permutation there and back."""

    def __init__(self, num_experts: int, ops: Operations, dropping: bool) -> None:
        self.num_experts, self.ops, self.dropping = num_experts, ops, dropping

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Any]:
        order = self.ops.sort_by_expert(experts_TK, self.num_experts, self.dropping)
        return self.ops.permute(x_TH, order), order.counts_E, (order, weights_TK)

    def combine(self, y_PH: Tensor, state: Any) -> Tensor:
        return self.ops.unpermute(y_PH, *state)


class Experts(nn.Module):
    """SwiGLU experts as two stacked weights, ``gate_up`` (E, 2I, H) and ``down`` (E, H, I), run by grouped matmuls.

    With ``linear_bias`` each has a bias as well, (E, 2I) and (E, H).
    """

    def __init__(self, config: MoEConfig, size: int, ops: Operations, **factory: Any) -> None:
        super().__init__()
        num_experts, hidden = config.num_experts, config.expert_hidden_size
        self.ops, self.limit = ops, config.swiglu_limit
        self.first = 0  # global number of the first expert held here
        self.total = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden, size, **factory))
        self.down = nn.Parameter(torch.empty(num_experts, size, hidden, **factory))
        self.gate_up_bias = self.down_bias = None
        if config.linear_bias:
            self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2 * hidden, **factory))
            self.down_bias = nn.Parameter(torch.empty(num_experts, size, **factory))

    def forward(self, rows_PH: Tensor, tokens_E: Tensor) -> Tensor:
        gate_up = self._project(rows_PH, self.gate_up, self.gate_up_bias, tokens_E)
        return self._project(self.ops.swiglu(gate_up, self.limit), self.down, self.down_bias, tokens_E)

    def _project(self, x_PI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, tokens_E: Tensor) -> Tensor:
        y_PO = self.ops.grouped_mm(x_PI, weight_EOI, tokens_E)
        return y_PO if bias_EO is None else self.ops.add_expert_bias(y_PO, bias_EO, tokens_E)

    def shard(self, first: int, count: int) -> None:
        """Keep only experts ``first`` to ``first + count - 1``; for a model that is still on the meta device."""
        self.first = first
        for name, weight in list(self.named_parameters()):
            assert weight.is_meta and weight.shape[0] == self.total, "experts are sharded once, on the meta device"
            setattr(self, name, nn.Parameter(torch.empty_like(weight[:count])))


class MoE(nn.Module):
    """Router, experts behind a replaceable dispatcher, and the shared expert that sees every token."""

    dispatcher: Dispatcher

    def __init__(self, config: ModelConfig, ops: Operations, name: str, **factory: Any) -> None:
        super().__init__()
        moe = config.moe
        self.name = name
        self.router = Router(moe, config.hidden_size, **factory)
        self.experts = Experts(moe, config.hidden_size, ops, **factory)
        self.dropping = moe.capacity_factor is not None  # whether some choices may have no expert
        self.dispatcher = LocalDispatcher(moe.num_experts, ops, self.dropping)
        hidden = moe.num_shared_experts * moe.expert_hidden_size
        self.shared = SwiGLU(config.hidden_size, hidden, ops, **factory) if hidden else None

    def forward(self, x_BSH: Tensor, context: Context) -> Tensor:
        routing = self.router(x_BSH, context)
        if context.recording:
            context.meters.count(self.name, routing.tokens_E)
        x_TH = x_BSH.flatten(0, 1)
        rows_PH, tokens_E, state = self.dispatcher.dispatch(x_TH, routing.experts_TK, routing.weights_TK)
        y_TH = self.dispatcher.combine(self.experts(rows_PH, tokens_E), state)
        y_BSH = y_TH.view_as(x_BSH)
        if self.shared is not None:
            y_BSH = y_BSH + self.shared(x_BSH)
        for name, loss in routing.losses.items():
            if context.recording:
                context.meters.add(name, loss)
            if torch.is_grad_enabled():
                y_BSH = attach_loss(y_BSH, loss)
        return y_BSH
