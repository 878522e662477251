"""From a config to everything that a run needs, in the order that leaves nothing behind when something is wrong."""

from dataclasses import dataclass
from pathlib import Path

import torch

import backends
from backends.base import Backend
from backends.errors import UserError
from parallel import deepep
from parallel import topology as topologies
from parallel.agreement import agree
from parallel.engine import Engine
from parallel.pipeline.pipeline import Pipeline
from parallel.topology import Topology
from trainer import checkpoint
from trainer.build import build
from trainer.config.schema import Config
from trainer.config.validate import validate_layout
from trainer.data import SequenceReader, Tokenizer, check_vocabulary, load_tokenizer, open_data
from trainer.facts import common_facts
from trainer.metrics.charts import check_installed
from trainer.model import MoETransformer
from trainer.place import find_place, initial_checkpoint, way_on
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
    pipeline: Pipeline
    step: int = 0  # steps done
    tokens: int = 0  # tokens trained on


def prepare(config: Config, where: str, resume: bool | str, may_start: bool = False) -> Run:
    """Check everything, then join the other ranks and build the model; load a checkpoint on resume.

    Args:
        config: the run.
        where: the config file, for messages.
        resume: whether to go on from the newest checkpoint; or the folder of the checkpoint to go on from.
        may_start: with ``resume``, start the run if it has no checkpoint yet.

    Raises:
        UserError: anything that the config, the files or the machine cannot do. Nothing was written then, caches of
            tokenizer and documents excepted.
    """
    run_dir, start_from = find_place(config, resume, may_start)
    initial = None if start_from else initial_checkpoint(config, where)
    validate_layout(config, topologies.world_size_from_environment(), where)
    check_installed(config.metrics, where)
    backend = backends.select(config.backend)
    dtype = weights_dtype(config.train.precision)
    if not backend.supports(dtype):
        raise UserError(
            f"{where}: train.precision: {config.train.precision} is not supported by {backend.device_name}; use fp32"
        )
    if config.parallel.dispatcher == "deepep" and config.parallel.expert > 1:
        deepep.check(backend, config.parallel.expert, config.model.hidden_size, where)
    tokenizer = load_tokenizer(config.data, where)
    check_vocabulary(tokenizer, config.model.vocab_size, where)
    training, validation = open_data(config.data, tokenizer, config.seed, where)

    backend.set_deterministic(config.train.deterministic)
    torch.manual_seed(config.seed)
    agree(common_facts(config, backend, training, validation))
    topology = topologies.start(backend, config.parallel)
    if topology.is_main:
        forget(run_dir)
    initial = topologies.said_by_main(initial)
    start_from = topologies.said_by_main(start_from)  # another rank may have looked too early for the newest one
    model, engine, pipeline = build(config, topology, backend)
    run = Run(config, where, run_dir, backend, topology, tokenizer, training, validation, model, engine, pipeline)
    if start_from is not None:
        try:
            state = checkpoint.load(start_from, model, engine, config, where)
        except UserError as error:
            raise UserError(f"{error}{way_on(start_from, str(error))}") from error
        run.step, run.tokens = state["step"], state["tokens"]
        training.load_state_dict(state["data"])
    elif initial is not None:
        checkpoint.load_initial(initial, model, engine, config, where)
    return run
