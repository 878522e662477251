"""Trains a few steps and reads everything on the way: a trace that is the same under every layout, up to rounding.

Two runs from the same weights: ``train``, as the config says, and ``still``, the same at learning rate 0. With noise
a third, like ``train`` but summed in another order, whose distance from ``train`` is the noise floor.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine import Shard
from parallel.pipeline.order import check
from trainer.config.catalogue import sections
from trainer.config.schema import Config
from trainer.facts import OWN_PLACES, PACKAGES
from trainer.model import MicroBatch
from trainer.setup import Run, prepare
from trainer.step import Step
from trainer.verify import trace as traces
from trainer.verify.forward import Forward
from trainer.verify.noise import NOISE, reduce_noise
from trainer.verify.readings import Readings, merged
from trainer.verify.trace import Header, Trace

STEPS = 3
_SAID = {"train": "as configured", "still": "at learning rate 0", NOISE: "in another order of sums"}
_log = logging.getLogger(__name__)
_NOT_OF_A_TRACE = {*OWN_PLACES, "name", "run_dir", "checkpoint.initial", "metrics.wandb_project"}


def record(config: Config, where: str, folder: Path, steps: int = STEPS, noise: bool = False) -> Trace | None:
    """Record a trace into ``folder``. Every rank calls this, started by any launcher or alone.

    Args:
        config: of the run; its layout is the one that is recorded.
        where: the config file, for messages.
        folder: gets `trace.json` and `trace.npz`, written by the main rank.
        steps: of each run.
        noise: measure the noise floor, with a pass more.

    Returns:
        the trace on the main rank, None on the others.

    Raises:
        UserError: what the config, the files or the machine cannot do.
    """
    config = replace(config, run_dir=str(folder / "run"))  # which nobody writes
    still = replace(config, optimizer=replace(config.optimizer, lr=0.0))
    readings = Readings()
    run = _pass("train", config, where, steps, readings)
    header, parameters = _header(run, steps), list(dict(run.model.named_parameters()))
    _pass("still", still, where, steps, readings)
    if noise:
        _pass(NOISE, _otherwise(config, run), where, steps, readings)
    everyone = run.topology.world
    parts: list[tuple[Readings, list[str]] | None] | None = [None] * everyone.size if run.topology.is_main else None
    dist.gather_object((readings, parameters), parts)
    if parts is None:
        return None
    whole, disagreements = merged([part[0] for part in parts if part])
    trace = traces.joined(whole, disagreements, header, _in_order([part[1] for part in parts if part]))
    reduce_noise(trace)
    traces.save(trace, folder)
    return trace


def _pass(name: str, config: Config, where: str, steps: int, readings: Readings) -> Run:
    """Train from the beginning for a few steps, and read."""
    run = prepare(config, where, resume=False)
    run.model.train()
    step = Step(config, run.topology, run.backend.device, run.model, run.engine, run.pipeline)
    forward = Forward(run.model, readings, step.sequences, config.data.sequence_length)
    readings.run, readings.step = name, 0
    _read_state(run, readings)
    for number in range(1, steps + 1):
        readings.step = number
        if run.topology.is_main:
            _log.info("step %d of %d, %s", number, steps, _SAID[name])
        micro_batches = step.cut(run.training.read(step.sequences, step.mine))
        first = step.mine.start
        _read_data(micro_batches, first, readings)
        with forward.watched(micro_batches, first):
            step.train(micro_batches[::-1] if name == NOISE else micro_batches)
        for shard in run.engine.contributions():
            _read_parameter("contribution", shard, shard.state["gradient"], run, readings)
        step.reduce()
        for shard in run.engine.reduced():
            _read_parameter("gradient", shard, shard.state["gradient"], run, readings)
        found = step.update(number, lambda: False)
        _read_state(run, readings)
        if run.topology.is_main:
            for loss, value in {**found.losses, "grad_norm": found.norm, "lr": found.lr}.items():
                readings.add("total", loss, torch.tensor(value, dtype=torch.float64), 0, 1)
        for layer, counts_E in found.counts.items():
            readings.agree("load", layer, counts_E.cpu().numpy())
    return run


def _read_data(micro_batches: list[MicroBatch], first: int, readings: Readings) -> None:
    """Digests of each sequence: tokens, labels, and positions with documents. Pipeline stages must agree."""
    for batch in micro_batches:
        fields = (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS)
        for row in range(len(batch.tokens_BS)):
            tokens, labels, *places = (None if field is None else field[row] for field in fields)
            value = np.array([_digest(tokens), _digest(labels), _digest(*places)])
            readings.agree("data", str(first), value)
            first += 1


def _read_state(run: Run, readings: Readings) -> None:
    """Weights and moments, the experts' biases, and whether replicas have the same weights."""
    for shard in run.engine.shards():
        for kind, values in shard.state.items():
            if kind == "weight" or readings.step > 0:
                _read_parameter(kind, shard, values, run, readings)
    experts = {name for group in run.engine.groups if group.expert for name in group.names}
    for name, parameter in run.model.named_parameters():
        place = f"{name}[{run.topology.ep.rank}]" if name in experts else name
        readings.agree("replica", place, np.array([_digest(parameter.detach())]))
    for name, buffer in run.model.named_buffers():
        readings.agree("bias", name, buffer.detach().cpu().numpy().copy())


def _read_parameter(kind: str, shard: Shard, values: Tensor, run: Run, readings: Readings) -> None:
    """What a rank has of a parameter, or of something like it; each expert of a stacked one by itself."""
    stacked = run.config.model.moe.num_experts if ".experts." in shard.name else 0
    if not stacked:
        readings.add(kind, shard.name, values, shard.offset, shard.whole)
        return
    size, start, end = shard.whole // stacked, shard.offset, shard.offset + shard.size
    for expert in range(start // size, -(-end // size)):
        low, high = max(start, expert * size), min(end, (expert + 1) * size)
        readings.add(kind, f"{shard.name}[{expert}]", values[low - start : high - start], low - expert * size, size)


def _digest(*tensors: Tensor | None) -> int:
    """64 bits of their bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor is not None:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _otherwise(config: Config, run: Run) -> Config:
    """The same run with smaller micro-batches, or larger where they cannot be smaller: other sums and other kernels.

    They run in the reverse order besides (:func:`_pass`), which is all where the schedule takes no other number.
    """
    train, pp = config.train, run.topology.pp.size
    share = train.global_batch_tokens // config.data.sequence_length // run.topology.dp.size
    for size in (1, 2):
        if size == train.micro_batch_size or share % size:
            continue
        try:
            check(config.parallel.schedule, pp, share // size, config.parallel.stages // config.parallel.pipeline)
        except ValueError:
            if pp > 1:
                continue
        return replace(config, train=replace(train, micro_batch_size=size))
    return config


def _in_order(names: list[list[str]]) -> list[str]:
    """Parameters of all ranks in the order of the forward pass; multi-token prediction stands before the head."""

    def place(name: str) -> tuple[int, int]:
        first, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        return ("embed", "layers", "norm", "mtp", "head").index(first), int(number) if number.isdigit() else 0

    return sorted(dict.fromkeys(name for part in names for name in part), key=place)


def _header(run: Run, steps: int) -> Header:
    keys = [key.path for section in sections(Config) for key in section.keys if key.path not in _NOT_OF_A_TRACE]
    mesh = run.engine.topology.mesh
    return Header(
        config={key: attrgetter(key)(run.config) for key in keys},
        steps=steps,
        backend=run.backend.name,
        device=run.backend.device_name,
        versions={package: version(package) for package in PACKAGES},
        layout=dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
    )
