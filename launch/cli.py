"""The `moebius` command. Nothing heavy is imported before a subcommand is chosen, so that help is instant."""

import argparse
import importlib
import sys
from importlib.metadata import version
from keyword import iskeyword

from launch.arguments import Parser
from launch.errors import USER_ERROR

COMMANDS = {
    "train": "train a model from a config",
    "generate": "continue prompts with a trained model",
    "eval": "loss, perplexity and bits per byte of a trained model",
    "info": "show versions, devices and what each backend can do here",
    "params": "count the parameters of a config's model by part",
    "plot": "draw the loss curve of a run",
    "pipeline": "draw the timeline of a pipeline schedule",
    "checkpoints": "list the checkpoints of a run, and check their files",
    "import": "make a checkpoint of published weights (Hugging Face safetensors)",
    "export": "write a checkpoint's model as published weights are",
}


def main(argv: list[str] | None = None) -> int:
    """Run ``moebius <command> ...``; each is the ``main(argv)`` of the module of that name, or of ``import_``."""
    commands = "\n".join(f"  {name:<13}{what}" for name, what in COMMANDS.items())
    parser = Parser(
        prog="moebius",
        description="A hardware-agnostic distributed trainer for Mixture-of-Experts language models.",
        epilog=f"commands:\n{commands}\n\n`moebius <command> --help` says more, and for train lists every config key.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moebius {version('moebius-train')}")
    parser.add_argument("command", metavar="command", choices=COMMANDS, help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments")
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        parser.print_help()
        return USER_ERROR
    chosen = parser.parse_args(arguments)
    module = f"{chosen.command}_" if iskeyword(chosen.command) else chosen.command
    return importlib.import_module(f"launch.{module}").main(chosen.arguments)


if __name__ == "__main__":
    sys.exit(main())
