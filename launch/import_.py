"""`moebius import`: published weights to a checkpoint."""

import argparse
import shlex
from pathlib import Path

from launch.arguments import Parser
from launch.errors import run


def main(argv: list[str]) -> int:
    """Make a checkpoint of a folder with config.json and safetensors files."""
    parser = Parser(
        prog="moebius import",
        description="Make a checkpoint of published weights: a folder with config.json, safetensors files and a "
        "tokenizer. Training can start from it, and `moebius generate` can use it.",
    )
    parser.add_argument("--from", dest="source", metavar="DIR", required=True, help="the folder of the weights")
    parser.add_argument("--to", dest="target", metavar="CKPT", required=True, help="the checkpoint folder to make")
    parser.add_argument("--debug", action="store_true", help="show tracebacks instead of one line")
    args = parser.parse_args(argv)
    return run(lambda: _import(args), args.debug)


def _import(args: argparse.Namespace) -> int:
    from trainer.checkpoint.folder import check_vacant
    from trainer.convert.published import check_folder

    check_vacant(Path(args.target))  # mistakes that need not wait for torch
    check_folder(Path(args.source))

    from trainer.convert import import_weights
    from trainer.metrics.units import si

    done = import_weights(Path(args.source), Path(args.target))
    for note in done.notes:
        print(note)
    target = shlex.quote(args.target)
    print(f"{args.target}: {si(done.parameters)} parameters of a {done.family} model")
    print("Try next:")
    print(f"  moebius generate --checkpoint {target} --prompt 'Once'")
    print(f"  moebius train --config {target}/config.yaml name=continued data.source=text 'data.paths=[~/texts]'")
    print(
        "The tokenizer of a config is `data.tokenizer.path`; that config.yaml names the one that came with the weights."
    )
    return 0
