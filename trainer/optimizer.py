"""AdamW with weight-decay groups, and the learning rate of every step."""

import math
from collections.abc import Callable
from typing import Any

import torch

from parallel.engine import ParameterGroup
from trainer.config.schema import OptimizerConfig, ScheduleConfig
from trainer.model import MoETransformer
from trainer.model.moe import Experts


def parameter_groups(model: MoETransformer, weight_decay: float) -> list[ParameterGroup]:
    """Matrices decay, vectors (norms and biases) do not; experts are apart because they have other replicas."""
    experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    groups = {
        (expert, decays): ParameterGroup([], [], weight_decay if decays else 0.0, expert)
        for expert in (False, True)
        for decays in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter is model.embedding_copy:
            continue  # its owner, the first pipeline stage, updates it
        expert = id(parameter) in experts
        group = groups[expert, parameter.dim() > (2 if expert else 1)]  # experts are stacked
        group.names.append(name)
        group.parameters.append(parameter)
    return list(groups.values())


def adamw(config: OptimizerConfig, fused: bool = True) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """A factory of AdamW (Loshchilov and Hutter, arXiv 1711.05101) over parameter-group dicts.

    ``fused`` is what the backend says of its device.
    """

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0, fused=fused
        )

    return make


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """The learning rate of step ``step`` (from 1) of ``steps``.

    A linear warm-up reaches ``peak`` at step ``warmup_steps``. Then cosine falls to ``min_ratio * peak`` at the last
    step (SGDR, arXiv 1608.03983, one cycle); constant stays; wsd (warm-up, stable, decay: MiniCPM,
    arXiv 2404.06395) stays and falls linearly to ``min_ratio * peak`` over the last ``decay_steps`` steps.
    """
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.kind == "cosine":
        progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
        share = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    elif config.kind == "wsd" and config.decay_steps:
        share = min(1.0, max(0.0, (steps - step) / config.decay_steps))
    else:
        return peak
    return peak * (config.min_ratio + (1 - config.min_ratio) * share)
