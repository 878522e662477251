"""`moebius generate`: text from a trained model."""

import argparse
from collections.abc import Callable

from launch.arguments import Parser, add_checkpoint, checkpoint_place
from launch.errors import run


def main(argv: list[str]) -> int:
    """Continue prompts with the model of a run or of one checkpoint."""
    parser = Parser(prog="moebius generate", description="Continue prompts with a trained model.")
    add_checkpoint(parser)
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
    args = parser.parse_args(argv)
    return run(lambda: _generate(args), args.debug)


def _generate(args: argparse.Namespace) -> int:
    place = checkpoint_place(args)

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
