"""On two ranks: every dispatcher against the same experts without expert parallelism.

Reports a dictionary of findings that tests/distributed/test_dispatch.py judges. DeepEP is a stand-in over gloo.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import backends
from parallel import topology
from parallel.clock import Clock
from parallel.config import ParallelConfig
from parallel.deepep import DeepEPDispatcher, DeepEPExchange
from parallel.dispatch import AllToAllDispatcher, Exchange
from tests.distributed import deep_ep
from tests.distributed.ranks import report
from tests.small import small_config, write_inputs
from trainer.build import build_model
from trainer.model.context import Share
from trainer.model.moe import Dispatcher, LocalDispatcher

EXPERTS, HIDDEN = 8, 16


def made(kind: str, place: topology.Topology) -> Dispatcher:
    ops, clock = backends.select("cpu").ops, Clock(torch.device("cpu"))
    if kind == "deepep":
        return DeepEPDispatcher(DeepEPExchange(place.ep, HIDDEN, clock), EXPERTS, ops, True)
    return AllToAllDispatcher(Exchange(place.ep, place.ep, clock), EXPERTS, ops, True)


def against_one_rank(kind: str, dtype: torch.dtype, place: topology.Topology) -> dict[str, float]:
    """Outputs and gradients, with dropped choices and an expert that nobody chooses: the largest errors, relative."""
    ops = backends.select("cpu").ops
    torch.manual_seed(place.rank)
    tokens, top_k = 11 + 5 * place.rank, 3
    x = torch.randn(tokens, HIDDEN, dtype=dtype)
    choices = torch.rand(tokens, EXPERTS).topk(top_k).indices
    choices[choices == 5] = EXPERTS  # dropped; and nobody chooses expert 5
    choices[:, 0][choices[:, 0] < 4] = 4  # uneven splits
    choices[3] = EXPERTS  # a token that goes nowhere
    scores = torch.rand(tokens, top_k, dtype=torch.float32).masked_fill(choices == EXPERTS, 0.0).to(dtype)
    weight = torch.randn(EXPERTS, HIDDEN, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(9))
    upstream = torch.randn(tokens, HIDDEN, dtype=dtype)

    def run(dispatcher: Dispatcher, mine: Tensor) -> tuple[Any, ...]:
        inputs = [x.clone().requires_grad_(), scores.clone().requires_grad_(), mine.clone().requires_grad_()]
        rows, counts, state = dispatcher.dispatch(inputs[0], choices, inputs[1])
        y = dispatcher.combine(ops.grouped_mm(rows, inputs[2], counts), state)
        y.backward(upstream)
        return y.detach(), *(value.grad for value in inputs)

    first = place.ep.rank * 4
    far = run(made(kind, place), weight[first : first + 4])
    near = run(LocalDispatcher(EXPERTS, ops, True), weight)
    everyones = near[3].contiguous()
    dist.all_reduce(everyones)  # the owner of an expert sees the tokens of both ranks
    expected = (*near[:3], everyones[first : first + 4])
    names = ("output", "x", "weights", "experts")
    return {name: float((a - b).abs().max() / b.abs().max()) for name, a, b in zip(names, far, expected, strict=True)}


def whole_model(kind: str, place: topology.Topology) -> dict[str, Any]:
    """Loss and gradients of a bf16 model as a config builds it, with layers that are computed again."""
    with tempfile.TemporaryDirectory() as folder:
        config = small_config(
            write_inputs(Path(folder)),
            "parallel.expert=2",
            f"parallel.dispatcher={kind}",
            "train.precision=bf16",
            "train.activation_checkpointing=layer",
        )
    model, _ = build_model(config, place, backends.select("cpu"))
    kinds = {type(moe.dispatcher).__name__ for _, moe in model.moe_layers()}
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(place.rank))
    loss = model(tokens, documents_BS=torch.zeros_like(tokens), labels_BS=tokens.roll(-1, 1), share=Share(1.0, 1.0))
    loss.backward()
    gradients = {
        name: float(weight.grad.double().norm()) for name, weight in model.named_parameters() if weight.grad is not None
    }
    return {"dispatchers": sorted(kinds), "loss": float(loss), "gradients": gradients}


def main() -> None:
    place = topology.start(backends.select("cpu"), ParallelConfig(expert=2))
    exact = mock.patch.object(deep_ep, "dtypes", [torch.float32])
    with mock.patch.dict(sys.modules, {"deep_ep": deep_ep}):
        found: dict[str, Any] = {"all-to-all": against_one_rank("all-to-all", torch.float64, place)}
        with exact:
            found["deepep fp32"] = against_one_rank("deepep", torch.float32, place)
        found["deepep bf16"] = against_one_rank("deepep", torch.bfloat16, place)
        found["models"] = {kind: whole_model(kind, place) for kind in ("all-to-all", "deepep")}
    report(found)


if __name__ == "__main__":
    main()
