"""Our own contenders: the model behind the engine, as `moebius train` runs it, and the same model in a plain loop.

Imported in a contender's own process only: it brings the allocator settings of ``backends`` with it.
"""

from typing import Any

from torch import Tensor
from torch.profiler import record_function

from backends import select
from backends.base import Backend
from backends.operations import IGNORED
from benchmarks.contender import Contender, plain_contender
from parallel import topology
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.model import MoETransformer, Share, materialize
from trainer.optimizer import parameter_groups
from trainer.precision import weights_dtype


def _prepare(job: dict[str, Any]) -> tuple[Config, Backend]:
    config = load_config(job["config"], job["overrides"])
    backend = select(config.backend)
    backend.set_deterministic(config.train.deterministic)
    return config, backend


def _loss(model: MoETransformer, tokens_BS: Tensor) -> Tensor:
    """Next-token loss; the last position predicts nothing, as in the peers."""
    labels_BS = tokens_BS.roll(-1, 1)
    labels_BS[:, -1] = IGNORED
    sequences = tokens_BS.shape[0]
    return model(tokens_BS, labels_BS=labels_BS, share=Share(tokens_BS.numel() - sequences, sequences))


def moebius(job: dict[str, Any]) -> Contender:
    """Through ``trainer.build.build``: the DeepSpeed engine with ZeRO-1."""
    from trainer.build import build  # brings in all of training, which the plain loop does without

    config, backend = _prepare(job)
    model, engine, _ = build(config, topology.start(backend, config.parallel), backend)
    model.train()

    def step(tokens_BS: Tensor) -> Tensor:
        loss = _loss(model, tokens_BS)
        loss.backward()
        with record_function("bench::optimizer"):
            engine.reduce()
            engine.step(config.optimizer.lr)
        _, counts = model.meters.take()
        with record_function("bench::routing"):
            for name, moe in model.moe_layers():
                moe.router.balance(counts[name])
        return loss

    return Contender(step, sum(p.numel() for p in model.parameters()))


def moebius_plain(job: dict[str, Any]) -> Contender:
    """The same model and groups with torch's own AdamW and clipping: what the engine costs is the difference.

    In bf16 this loop does less than the engine, which keeps fp32 master weights, moments and gradients.
    """
    config, backend = _prepare(job)
    dtype = weights_dtype(config.train.precision)
    model = MoETransformer(config.model, backend.ops, dtype=dtype)
    materialize(model, config.seed, backend.device)
    groups = [
        {"params": group.parameters, "weight_decay": group.weight_decay}
        for group in parameter_groups(model, config.optimizer.weight_decay)
        if group.parameters
    ]

    def loss(tokens_BS: Tensor) -> Tensor:
        value = _loss(model, tokens_BS)
        _, counts = model.meters.take()
        for name, moe in model.moe_layers():
            moe.router.balance(counts[name])
        return value

    return plain_contender(model, loss, job, groups)
