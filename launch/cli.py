"""The `moebius` command. Nothing heavy is imported before a subcommand is chosen, so that help is instant."""

import sys
from importlib.metadata import version

from launch.arguments import choose

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
    "verify": "compare operations, layouts and runs with what they should be",
}


def main(argv: list[str] | None = None) -> int:
    """Run ``moebius <command> ...``; each is the ``main(argv)`` of the module of that name, or of ``import_``."""
    return choose(
        "moebius",
        "A hardware-agnostic distributed trainer for Mixture-of-Experts language models.",
        COMMANDS,
        "`moebius <command> --help` says more, and for train lists every config key.",
        "launch",
        sys.argv[1:] if argv is None else argv,
        version=f"moebius {version('moebius-train')}",
    )


if __name__ == "__main__":
    sys.exit(main())
