"""`moebius eval`: how well a trained model predicts a text."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import KeysParser, add_checkpoint, checkpoint_place
from launch.errors import run

if TYPE_CHECKING:
    from trainer.evaluation import Evaluation

_TEXT = {"data.source", "data.paths", "data.hub_subset", "data.hub_split"}  # one of them given: it is another text
_HELD_OUT = {"data.validation_paths", "data.validation_fraction"}


def main(argv: list[str]) -> int:
    """Evaluate the model of a run or of one checkpoint, on the held-out part of its own data or on another text."""
    parser = KeysParser(
        "moebius eval",
        "Loss, perplexity and bits per byte of a trained model on the held-out part of its own data, or on all of "
        "another text that data.* keys name.",
        _keys,
    )
    add_checkpoint(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, in full precision")
    args = parser.parse(argv)
    return run(lambda: _eval(args), args.debug)


def _keys() -> list[str]:
    """The keys that decide about an evaluation. The tokenizer is the checkpoint's."""
    from trainer.config.catalogue import sections
    from trainer.config.schema import Config

    data = [key.path for section in sections(Config) if section.path == "data" for key in section.keys]
    return [*(key for key in data if key != "data.shuffle"), "train.eval_sequences", "train.micro_batch_size"]


def _eval(args: argparse.Namespace) -> int:
    from backends.errors import UserError
    from trainer.config.load import from_overrides

    given = {name for _, name, _ in from_overrides(args.overrides)}
    for name in sorted(given.difference(_keys())):
        raise UserError(f"command line: {name}: is no key of an evaluation; use {', '.join(_keys())}")
    from trainer.checkpoint.folder import located

    checkpoint = located(checkpoint_place(args))  # a mistake here need not wait for torch

    from launch.show import announce, console, table

    announce()
    name, found = _evaluated(checkpoint, args.overrides, given, args.backend)
    figures = {**vars(found), "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
    if args.json:
        print(json.dumps({"checkpoint": name, **figures}, indent=2))
        return 0
    shown = table("checkpoint", "sequences", "tokens", "loss", "perplexity", "bits per byte", numbers=5)
    counts = f"{found.sequences:,}", f"{found.tokens:,}"
    shown.add_row(name, *counts, f"{found.loss:.4f}", f"{found.perplexity:,.2f}", f"{found.bits_per_byte:.4f}")
    console().print(shown)
    return 0


def _evaluated(checkpoint: Path, overrides: list[str], given: set[str], backend_name: str) -> "tuple[str, Evaluation]":
    """The name of the checkpoint, and what the evaluation found."""
    from dataclasses import replace

    import torch

    from backends import select
    from parallel.clock import Clock
    from parallel.config import ParallelConfig
    from parallel.topology import joined
    from trainer.build import pipeline_around
    from trainer.checkpoint.folder import CONFIG
    from trainer.checkpoint.inference import model_and_tokenizer
    from trainer.config.load import load_with_origins
    from trainer.data import open_evaluation
    from trainer.evaluation import evaluate

    where = str(checkpoint / CONFIG)
    # There is no global batch, which a sequence of another length would have to fit.
    config, origins = load_with_origins(where, [*overrides, "train.global_batch_tokens=${data.sequence_length}"])
    config.parallel = ParallelConfig()
    another = not given.isdisjoint(_TEXT)
    if another and "data.validation_paths" not in given:
        config.data = replace(config.data, validation_paths=[])
    everything = another and given.isdisjoint(_HELD_OUT)
    if everything and "train.eval_sequences" not in given:
        config.train = replace(config.train, eval_sequences=0)
    backend = select(backend_name)
    backend.set_deterministic(config.train.deterministic)
    with origins.named(), joined(backend, config.parallel) as topology:
        model, tokenizer = model_and_tokenizer(checkpoint, config, backend)
        reader = open_evaluation(config.data, tokenizer, everything, where)
        pipeline = pipeline_around(model, config, topology, backend, Clock(backend.device))
        bytes_V = torch.from_numpy(tokenizer.byte_lengths())
        return checkpoint.name, evaluate(model, pipeline, topology, backend, reader, config, bytes_V)
