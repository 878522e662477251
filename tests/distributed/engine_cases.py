"""On two ranks: what the DeepSpeed adapter must get right, each a trap that is silent otherwise.

Reports a dictionary of findings that tests/distributed/test_engine.py judges.
"""

import math
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import backends
from backends.weight_gradients import deferred
from parallel import buckets, topology
from parallel.config import ParallelConfig
from parallel.engine import Engine, ParameterGroup
from parallel.gradients import FlatGroup, WholeGradients
from tests.distributed.ranks import report


def engine_over(
    parameters: dict[str, nn.Parameter], place: topology.Topology, expert: bool, clip: float = 0.0, stage: int = 1
) -> Engine:
    module = nn.ParameterDict({name.replace(".", "_"): p for name, p in parameters.items()})
    group = ParameterGroup(list(parameters), list(parameters.values()), 0.0, expert)

    def sgd_like(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1.0, betas=(0.0, 0.0), eps=1.0, fused=True)

    return Engine(module, [group], sgd_like, place, backends.select("cpu"), clip, zero_stage=stage)


def own_gradients(engine: Engine) -> list[float]:
    """The summed gradient in the part of the flat buffer that this rank steps."""
    engine.reduce()
    return engine.zero.averaged_gradients[0].flat_partition.tolist()


def bf16_reduction(place: topology.Topology) -> list[float]:
    """Rank r contributes 1 + r·2^-9 in two micro-batches: sums that bf16 cannot hold."""
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    engine = engine_over({"w": parameter}, place, expert=False)
    for value in (1.0, 2.0**-9 * (place.rank + 1)):
        parameter.grad = torch.full_like(parameter, value)
        engine.flush()
    return own_gradients(engine)


def gradient_without_hooks(place: topology.Topology) -> list[float]:
    """A split backward's weight pass sets ``.grad`` itself; no hook runs."""
    hooked, bare = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    engine = engine_over({"hooked": hooked, "bare": bare}, place, expert=False)
    (hooked * 3.0).sum().backward()
    bare.grad = torch.full((2,), 5.0)
    return own_gradients(engine)


def deferred_and_tied(place: topology.Topology) -> list[float]:
    """A weight behind a lookup and a multiply, and one behind a multiply only; the multiplies' gradients come later."""
    ops = backends.select("cpu").ops
    tied, plain = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    engine = engine_over({"tied": tied, "plain": plain}, place, expert=False)
    for _ in range(2):
        x = nn.functional.embedding(torch.tensor([1]), tied)
        with deferred() as store:
            (ops.linear(x, tied) + ops.linear(x.detach(), plain)).sum().backward()
        store.run()
    return own_gradients(engine)


def unused_parameter(place: topology.Topology) -> list[float]:
    """A parameter that took no part must not step with the last step's gradient."""
    parameter = nn.Parameter(torch.ones(4))
    engine = engine_over({"w": parameter}, place, expert=False)
    (parameter * 2.0).sum().backward()
    engine.reduce()
    engine.step(0.0)
    return own_gradients(engine)


def expert_replicas(place: topology.Topology, stage: int) -> list[float]:
    """ep 2: each rank has experts of its own, whose gradients nobody else may add to."""
    parameter = nn.Parameter(torch.ones(2))
    engine = engine_over({"w": parameter}, place, expert=True, stage=stage)
    (parameter * (place.rank + 1.0)).sum().backward()
    engine.end_micro_batch()
    return own_gradients(engine)


def both_stages(place: topology.Topology) -> dict[str, Any]:
    """ZeRO-1 and ZeRO-2 on the same gradients: two steps, of three micro-batches and of one.

    Whole numbers, so that any order of sums is exact. Buckets of 16 elements: `large` has one of its own, which both
    ranks own some of; `some` shares one with `small`, `last` with `none`. Rank 1 does not use `some`, nobody `none`.
    """
    shapes = {"tied": (4, 3), "small": (3,), "some": (3, 3), "large": (9, 3), "none": (5,), "last": (3, 3)}
    ops = backends.select("cpu").ops
    found: dict[str, Any] = {}
    for stage in (1, 2):
        weights = {
            name: nn.Parameter((torch.arange(math.prod(shape)) % 3 + 1.0).view(shape)) for name, shape in shapes.items()
        }
        bare = nn.Parameter(torch.ones(2))
        with mock.patch.object(buckets, "BUCKET_BYTES", 64):
            engine = engine_over({**weights, "bare": bare}, place, expert=False, stage=stage)
        draw = torch.Generator().manual_seed(place.rank)
        steps = []
        for micro_batches in (3, 1):
            for number in range(micro_batches):
                tokens = torch.randint(4, (5,), generator=draw)
                x = torch.nn.functional.embedding(tokens, weights["tied"]) * weights["small"]
                if place.rank == 0:
                    x = ops.linear(x, weights["some"])
                x = ops.linear(ops.linear(x, weights["large"]).view(-1, 3), weights["last"])
                ops.linear(x, weights["tied"]).sum().backward()
                bare.grad = torch.full((2,), number + 1.0)
                engine.end_micro_batch()
            engine.reduce()
            part = engine.zero.averaged_gradients[0].flat_partition
            steps.append(part.tolist())
            engine.step(0.0)
        found[f"zero {stage}"] = {"steps": steps, "held": part.untyped_storage().nbytes() // part.itemsize}
    return found


def gradients_too_late(place: topology.Topology) -> list[str]:
    """A second backward pass in a micro-batch, and a step without the end of one."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    engine = engine_over({"first": first, "second": second}, place, expert=False, stage=2)
    said = []
    for _ in range(2):
        try:
            (first * second).sum().backward()
        except AssertionError as error:
            said.append(str(error))
    first.grad = second.grad = None
    engine.end_micro_batch()
    first.grad = torch.ones(2)
    try:
        engine.reduce()
    except AssertionError as error:
        said.append(str(error))
    return said


def memory(place: topology.Topology) -> dict[str, float]:
    """Growth of the process, in MiB, over a step of three micro-batches on 48 MiB of weights, 24 of them ours."""
    backend = backends.select("cpu")
    weights = [nn.Parameter(torch.full((1024, 512), 1e-3)) for _ in range(24)]
    group = FlatGroup(weights, range(0, 24 << 19, 1 << 19), 24 << 19, place.dp)
    # Whatever is made at a first use, by autograd and by gloo.
    backend.ops.linear(torch.ones(1, 2), nn.Parameter(torch.ones(2, 2))).sum().backward()
    dist.reduce(torch.ones(2), 0)
    grown = {}
    for stage in (2, 1):  # the first leaves little for the other to take over
        backend.reset_peak_memory()
        before = backend.memory().allocated
        with mock.patch.object(buckets, "BUCKET_BYTES", 4 << 20):
            kept = (
                WholeGradients([group])
                if stage == 1
                else buckets.PartGradients([group], {weight: number for number, weight in enumerate(weights)})
            )
        for weight, slot in kept.slots.items():
            weight.gradient_slot = slot  # type: ignore[attr-defined]
        for _ in range(3):
            x = torch.ones(1, 512)
            for weight in weights:
                x = backend.ops.linear(x, weight)[:, :512]
            x.sum().backward()
            kept.end_micro_batch()
        for slot in kept.slots.values():
            slot.close()
        kept.reduce()
        grown[f"zero {stage}"] = (backend.memory().peak - before) / 2**20
        del kept, slot
    return grown


def global_norm(place: topology.Topology) -> list[float]:
    """Experts (different on each rank) and a dense weight (the same): each counted once. Then clipped by it."""
    dense, expert = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [
        ParameterGroup(["dense"], [dense], 0.0, expert=False),
        ParameterGroup(["expert"], [expert], 0.0, expert=True),
    ]
    engine = Engine(
        nn.ParameterList([dense, expert]),
        groups,
        lambda g: torch.optim.AdamW(g, lr=1.0, betas=(0.0, 0.0), eps=1e9, fused=True),
        place,
        backends.select("cpu"),
        clip_norm=1.0,
    )
    # Dense gradient: 1 + 1 over the two ranks = 2. Experts: 2 on rank 0, 1 on rank 1. Norm sqrt(4 + 4 + 1) = 3.
    (dense * 1.0 + expert * (2.0 - place.rank)).sum().backward()
    engine.reduce()
    norm = engine.step(1.0)
    # eps 1e9 makes AdamW's step -gradient / 1e9: the update shows the clipped gradient.
    return [norm, float(dense) * -1e9, float(expert) * -1e9]


def main() -> None:
    backend = backends.select("cpu")
    data = topology.start(backend, ParallelConfig())
    expert = topology.start(backend, ParallelConfig(expert=2))
    report(
        {
            "memory": memory(data),  # first: nothing has been freed that could be taken again
            "bf16_reduction": bf16_reduction(data),
            "gradient_without_hooks": gradient_without_hooks(data),
            "deferred_and_tied": deferred_and_tied(data),
            "unused_parameter": unused_parameter(data),
            "both_stages": both_stages(data),
            "gradients_too_late": gradients_too_late(data),
            "expert_replicas": [expert_replicas(expert, stage) for stage in (1, 2)],
            "global_norm": global_norm(expert),
        }
    )


if __name__ == "__main__":
    main()
