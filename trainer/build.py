"""From a config and this rank's place to its part of the model, the engine around it and its end of the pipeline."""

from collections.abc import Callable
from math import ceil

import torch

from backends.base import Backend
from parallel.clock import Clock
from parallel.deepep import DeepEPDispatcher, DeepEPExchange
from parallel.dispatch import AllToAllDispatcher, Exchange, MoELayer, shard_experts
from parallel.engine import Engine
from parallel.pipeline.pipeline import Pipeline, held_by
from parallel.pipeline.shared import SharedWeight
from parallel.pipeline.split import Part, balanced
from parallel.topology import Axis, Topology
from trainer.config.schema import Config
from trainer.model import MoETransformer, materialize
from trainer.model.count import layer_costs
from trainer.model.moe import Dispatcher
from trainer.optimizer import adamw, parameter_groups
from trainer.precision import weights_dtype


def build(config: Config, topology: Topology, backend: Backend) -> tuple[MoETransformer, Engine, Pipeline]:
    """This rank's part of the model with its initial weights, the engine around it, and its end of the pipeline."""
    model, pipeline = build_model(config, topology, backend)
    engine = Engine(
        model,
        parameter_groups(model, config.optimizer.weight_decay),
        adamw(config.optimizer, fused=backend.fused_adamw),
        topology,
        backend,
        clip_norm=config.optimizer.clip_norm,
        shared=_shared_embedding(model, topology.pp),
        zero_stage=config.parallel.zero,
    )
    return model, engine, pipeline


def build_model(config: Config, topology: Topology, backend: Backend) -> tuple[MoETransformer, Pipeline]:
    """The same without an engine."""
    train = config.train
    model = MoETransformer(
        config.model,
        backend.ops,
        dtype=weights_dtype(train.precision),
        recompute=train.activation_checkpointing == "layer",
        parts=[part for _, part in _held(config, topology.pp)],
    )
    clock = Clock(backend.device)
    if topology.ep.size > 1:
        made = _dispatcher(config, topology, backend, clock)
        shard_experts([moe for _, moe in model.moe_layers()], topology.ep, made)
    materialize(model, config.seed, backend.device)
    return model, pipeline_around(model, config, topology, backend, clock)


def _dispatcher(config: Config, topology: Topology, backend: Backend, clock: Clock) -> Callable[[MoELayer], Dispatcher]:
    """What makes the dispatcher of a layer."""
    if config.parallel.dispatcher == "deepep":
        buffer = DeepEPExchange(topology.ep, config.model.hidden_size, clock)
        return lambda layer: DeepEPDispatcher(buffer, layer.experts.total, backend.ops, layer.dropping)
    exchange = Exchange(topology.ep, topology.ep_backward, clock)
    return lambda layer: AllToAllDispatcher(exchange, layer.experts.total, backend.ops, layer.dropping)


def pipeline_around(
    model: MoETransformer, config: Config, topology: Topology, backend: Backend, clock: Clock
) -> Pipeline:
    """This rank's end of the pipeline, for a model that holds its parts."""
    train, layout = config.train, config.parallel
    dtype = weights_dtype(train.precision)
    hidden_dtype = torch.promote_types(dtype, torch.float32) if config.model.residual_fp32 else dtype
    sequences = train.global_batch_tokens // config.data.sequence_length
    shape = (train.micro_batch_size, config.data.sequence_length, config.model.hidden_size)
    return Pipeline(
        model,
        _held(config, topology.pp),
        len(layers_per_stage(config)),
        topology.pp,
        layout.schedule,
        ceil(sequences / topology.dp.size / train.micro_batch_size),  # without a pipeline the last may be smaller
        torch.empty(shape, dtype=hidden_dtype, device=backend.device),
        clock,
    )


def _held(config: Config, pp: Axis) -> list[tuple[int, Part]]:
    """Number and part of every stage of this rank."""
    return held_by(pp.rank, pp.size, layers_per_stage(config), config.parallel.schedule)


def layers_per_stage(config: Config) -> list[int]:
    """As the config gives them, or balanced by cost."""
    layout = config.parallel
    if layout.pipeline == 1:
        return [config.model.num_layers]
    if layout.layers_per_stage:
        return list(layout.layers_per_stage)
    costs = layer_costs(config.model, config.data.sequence_length)
    return balanced(costs.layers, costs.before, costs.after, layout.stages)


def _shared_embedding(model: MoETransformer, pp: Axis) -> SharedWeight | None:
    """The embedding where the last stage of the pipeline uses it too and is another rank's."""
    uses = model.config.tie_embeddings or model.config.mtp_layers > 0
    if model.embedding_copy is not None:
        return SharedWeight(model.embedding_copy, pp)
    if pp.size > 1 and pp.rank == 0 and uses and not hasattr(model, "head"):
        return SharedWeight(next(model.embed.parameters()), pp)
    return None
