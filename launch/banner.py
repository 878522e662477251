"""What is about to be trained, on what, and where: six lines before the first step."""

from typing import TYPE_CHECKING

import torch

from trainer.metrics.units import si

if TYPE_CHECKING:
    from trainer.data import SequenceReader
    from trainer.setup import Run


def banner(run: "Run") -> str:
    """Lines of a word and what there is to say about it, aligned."""
    lines = {
        "model": _model(run),
        "device": _device(run),
        "layout": _layout(run),
        "data": _data(run),
        "batch": _batch(run),
        "run": _place(run),
    }
    return "\n".join(f"{word:<6}  {text}" for word, text in lines.items())


def _model(run: "Run") -> str:
    from trainer.model import MoETransformer
    from trainer.model.count import count_parameters

    # The run's own holds this rank's share of the experts only.
    counts = count_parameters(MoETransformer(run.config.model, run.backend.ops, device="meta")).values()
    total, active = sum(count.total for count in counts), sum(count.active for count in counts)
    return f"{si(total)} parameters, {si(active)} active per token"


def _device(run: "Run") -> str:
    threads = f", {_many(torch.get_num_threads(), 'thread')}" if run.backend.device.type == "cpu" else ""
    return f"{run.backend.name}: {run.backend.device_name}{threads}, {run.config.train.precision}"


def _layout(run: "Run") -> str:
    axes = {"pipeline": run.topology.pp, "data": run.topology.edp, "expert": run.topology.ep}
    sizes = " x ".join(f"{axis.size} {name}" for name, axis in axes.items())
    world = run.topology.world_size
    return "1 process" if world == 1 else f"{world} processes: {sizes}"


def _data(run: "Run") -> str:
    data = run.config.data
    if run.training.extent is None:
        return f"{data.source}, streamed; tokenizer of {run.tokenizer.vocab_size:,} entries"
    return (
        f"{data.source}: {_extent(run.training)}; held out {_extent(run.validation)}; "
        f"tokenizer of {run.tokenizer.vocab_size:,} entries"
    )


def _extent(reader: "SequenceReader") -> str:
    assert reader.extent is not None
    documents, tokens = reader.extent
    return f"{_many(documents, 'document')}, {si(tokens)} tokens"


def _batch(run: "Run") -> str:
    train, length = run.config.train, run.config.data.sequence_length
    step = f"{_many(train.global_batch_tokens // length, 'sequence')} of {length:,} tokens a step"
    total = train.steps * train.global_batch_tokens
    epochs = f", {total / run.training.extent[1]:.2g} epochs" if run.training.extent else ""
    return f"{step}; {_many(train.steps, 'step')}, {si(total)} tokens{epochs}"


def _place(run: "Run") -> str:
    left = run.config.train.steps - run.step
    if not run.step:
        return str(run.run_dir)
    going_on = f"{run.run_dir}, from step {run.step:,}"
    return f"{going_on} on" if left > 0 else f"{going_on}: nothing is left to train; raise train.steps to go on"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
