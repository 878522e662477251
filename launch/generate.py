"""`moebius generate`: text from a trained model."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from launch.arguments import Parser
from launch.errors import run


def main(argv: list[str]) -> int:
    """Continue prompts with the model of a run or of one checkpoint."""
    parser = Parser(prog="moebius generate", description="Continue prompts with a trained model.")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--run", metavar="RUN_DIR", help="a run directory; its newest checkpoint is used")
    place.add_argument("--checkpoint", metavar="DIR", help="one checkpoint directory")
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", help="text to continue; may be repeated (default: a new document)"
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=_whole, default=128, help="tokens to add (default: 128)")
    parser.add_argument(
        "--temperature", metavar="T", type=_natural, default=0.8, help="0 takes the likeliest token (default: 0.8)"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=_share, default=0.95, help="probability kept for sampling (default: 0.95)"
    )
    parser.add_argument("--seed", metavar="S", type=_whole, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda", "ascend"), default="auto", help="where it runs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks instead of one line")
    args = parser.parse_args(argv)
    return run(lambda: _generate(args), args.debug)


def _generate(args: argparse.Namespace) -> int:
    from backends.errors import UserError

    place = args.run or args.checkpoint
    if not Path(place).is_dir():
        raise UserError(f"{place}: there is no such folder; give a run directory, or a folder inside its checkpoints/")
    if sys.stderr.isatty():
        print(f"loading {place} ...", file=sys.stderr, flush=True)

    from backends import select
    from trainer.checkpoint import load_for_inference
    from trainer.generate import stream

    backend = select(args.backend)
    model, tokenizer, config = load_for_inference(place, backend)
    for index, prompt in enumerate(args.prompt or [""]):
        if index:
            print("\n")
        for piece in stream(
            model,
            tokenizer,
            prompt,
            max_new_tokens=args.max_new_tokens,
            sequence_length=config.data.sequence_length,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed + index,
            device=backend.device,
        ):
            print(piece, end="", flush=True)
    print()
    return 0


def _whole(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 0 or more")
    return value


def _natural(text: str) -> float:
    return _number(text, lambda value: 0 <= value < float("inf"), "of 0 or more")


def _share(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "above 0 and at most 1")


def _number(text: str, holds: Callable[[float], bool], rule: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not holds(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number {rule}")
    return value
