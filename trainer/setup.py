"""From a config to everything that a run needs, in the order that leaves nothing behind when something is wrong."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

import backends
from backends.base import Backend
from backends.errors import UserError
from parallel import topology as topologies
from parallel.dispatch import shard_experts
from parallel.engine import Engine
from parallel.topology import Topology
from trainer import checkpoint
from trainer.config.schema import Config
from trainer.config.validate import validate_layout
from trainer.data import SequenceReader, Tokenizer, check_vocabulary, load_tokenizer, open_data
from trainer.metrics.charts import check_installed
from trainer.model import MoETransformer, materialize
from trainer.optimizer import adamw, parameter_groups
from trainer.precision import weights_dtype
from trainer.restart import forget


@dataclass
class Run:
    """What the loop works with."""

    config: Config
    where: str  # the config file, for messages
    run_dir: Path
    backend: Backend
    topology: Topology
    tokenizer: Tokenizer
    training: SequenceReader
    validation: SequenceReader
    model: MoETransformer
    engine: Engine
    step: int = 0  # steps done
    tokens: int = 0  # tokens trained on


def prepare(config: Config, where: str, resume: bool, may_start: bool = False) -> Run:
    """Check everything, then join the other ranks and build the model; load the newest checkpoint on resume.

    Args:
        resume: go on with the run that the run directory holds.
        may_start: with ``resume``, start it if it has no checkpoint yet.

    Raises:
        UserError: anything that the config, the files or the machine cannot do. Nothing was written then, caches of
            tokenizer and documents excepted.
    """
    run_dir = run_dir_of(config)
    _check_place(run_dir)
    start_from = checkpoint.starting_point(run_dir, resume, may_start)
    validate_layout(config, topologies.world_size_from_environment(), where)
    check_installed(config.metrics, where)
    backend = backends.select(config.backend)
    dtype = weights_dtype(config.train.precision)
    if not backend.supports(dtype):
        raise UserError(
            f"{where}: train.precision: {config.train.precision} is not supported by {backend.device_name}; use fp32"
        )
    tokenizer = load_tokenizer(config.data, where)
    check_vocabulary(tokenizer, config.model.vocab_size, where)
    training, validation = open_data(config.data, tokenizer, config.seed, where)

    backend.set_deterministic(config.train.deterministic)
    torch.manual_seed(config.seed)
    topology = topologies.start(backend, config.parallel)
    if topology.is_main:
        forget(run_dir)
    start_from = topologies.said_by_main(start_from)  # another rank may have looked too early for the newest one
    model, engine = build(config, topology, backend)
    run = Run(config, where, run_dir, backend, topology, tokenizer, training, validation, model, engine)
    if start_from is not None:
        state = checkpoint.load(start_from, model, engine, config, where)
        run.step, run.tokens = state["step"], state["tokens"]
        training.load_state_dict(state["data"])
    return run


def run_dir_of(config: Config) -> Path:
    """Where the run lives."""
    return Path(config.run_dir or f"runs/{config.name}")


def build(config: Config, topology: Topology, backend: Backend) -> tuple[MoETransformer, Engine]:
    """The model with this rank's experts and its initial weights, and the engine around it."""
    train = config.train
    dtype = weights_dtype(train.precision)
    model = MoETransformer(config.model, backend.ops, dtype=dtype, recompute=train.activation_checkpointing == "layer")
    shard_experts([moe for _, moe in model.moe_layers()], topology.ep, backend.ops)
    materialize(model, config.seed, backend.device)
    engine = Engine(
        model,
        parameter_groups(model, config.optimizer.weight_decay),
        adamw(config.optimizer),
        topology,
        backend,
        clip_norm=config.optimizer.clip_norm,
    )
    return model, engine


def _check_place(run_dir: Path) -> None:
    """Raise a :class:`UserError` if the run could not be written, before anything is."""
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"run_dir: {run_dir}: {there} is a file; choose another run_dir=...")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: {run_dir}: {there} may not be written to; choose another run_dir=...")
