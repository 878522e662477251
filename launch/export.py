"""`moebius export`: a checkpoint's model as published weights."""

import argparse
import re
from pathlib import Path

from launch.arguments import Parser
from launch.errors import run

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str]) -> int:
    """Write config.json, safetensors files and the tokenizer of a checkpoint."""
    parser = Parser(
        prog="moebius export",
        description="Write the model of a checkpoint as a folder that transformers reads: config.json, safetensors "
        "files and the tokenizer.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="CKPT",
        required=True,
        help="a checkpoint folder, or a run directory; its newest checkpoint is used",
    )
    parser.add_argument("--to", dest="target", metavar="DIR", required=True, help="the folder to make")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (default: what it was trained in)")
    parser.add_argument(
        "--family", metavar="NAME", type=_family, help="model_type to write (default: that of the imported weights)"
    )
    parser.add_argument(
        "--file-size", metavar="SIZE", type=_size, default="5GB", help="largest file of weights (default: 5GB)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks instead of one line")
    args = parser.parse_args(argv)
    return run(lambda: _export(args), args.debug)


def _export(args: argparse.Namespace) -> int:
    from trainer.checkpoint.folder import check_vacant, located

    checkpoint = located(args.source)  # mistakes that need not wait for torch
    check_vacant(Path(args.target))

    from trainer.convert import export_weights

    done = export_weights(checkpoint, Path(args.target), args.dtype, args.family, args.file_size)
    files = f"{done.files} file{'s' * (done.files > 1)}"
    print(f"{args.target}: {files} of {done.dtype} weights of a {done.family} model, config.json and tokenizer")
    return 0


def _family(text: str) -> str:
    from trainer.convert.families import FAMILIES  # imports no torch

    if text not in FAMILIES:
        raise argparse.ArgumentTypeError(f"'{text}' is no family; there are {', '.join(FAMILIES)}")
    return text


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write for instance 5GB")
    return int(match[1]) * _UNITS[match[2]]
