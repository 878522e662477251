"""What is timed: one optimizer step on given tokens. Knows torch only, so that peers inherit nothing of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function


class Unavailable(Exception):
    """A contender that cannot run here; the message says what is missing."""


@dataclass
class Contender:
    """A trainer with its model built."""

    step: Callable[[Tensor], Tensor]  # tokens (B, S) in, loss out; weights updated
    parameters: int


def fused_adamw(parameters: Any, job: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW with the values that every contender uses."""
    values = job["optimizer"]
    return torch.optim.AdamW(
        parameters,
        lr=values["lr"],
        betas=(values["beta1"], values["beta2"]),
        eps=values["eps"],
        weight_decay=values["weight_decay"],
        fused=True,
    )


def plain_contender(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    job: dict[str, Any],
    groups: list[dict[str, Any]] | None = None,
) -> Contender:
    """The loop that everybody writes: backward, clip, step, zero."""
    parameters = list(model.parameters())
    optimizer = fused_adamw(groups or parameters, job)
    clip = job["optimizer"]["clip_norm"]
    model.train()

    def step(tokens_BS: Tensor) -> Tensor:
        loss = loss_of(tokens_BS)
        loss.backward()
        with record_function("bench::optimizer"):
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return Contender(step, sum(p.numel() for p in parameters))


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The best FLOP/s of a square multiply within ``seconds``."""
    import time

    from benchmarks.worker import synchronize

    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
