"""Training: what `moebius train`, the deepspeed launcher and torchrun start."""

import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":  # started as a file: the launcher puts launch/ on the path, not the folder above it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.arguments import train_parser
from launch.errors import run


def main(argv: list[str]) -> int:
    """Train the model of ``--config`` to its last step."""
    args = train_parser().parse_intermixed_args(argv)
    return run(lambda: _train(args.config, args.overrides, args.resume, args.auto_resume, args.sample), args.debug)


def _train(path: str, overrides: list[str], resume: bool, auto_resume: bool, sample: bool) -> int:
    from trainer.config.load import load_config

    config = load_config(path, overrides)

    from parallel.topology import stop
    from trainer.loop import Loop
    from trainer.restart import explain_lost_peer
    from trainer.setup import prepare, run_dir_of

    prepared = None
    try:
        prepared = prepare(config, path, resume or auto_resume, may_start=auto_resume)
        finished = Loop(prepared).train()
    except RuntimeError as error:
        explain_lost_peer(error, run_dir_of(config), prepared.step if prepared else None)
        raise
    finally:
        stop()
    if finished and prepared.topology.is_main:
        if sample:
            _sample(str(prepared.run_dir), config.backend)
        _what_next(prepared.run_dir, path)
    return 0


def _sample(run_dir: str, backend_name: str) -> None:
    """A few lines from the trained model."""
    from backends import select
    from trainer.checkpoint import load_for_inference
    from trainer.generate import sample

    backend = select(backend_name)
    model, tokenizer, config = load_for_inference(run_dir, backend)
    print("\nA sample of what the model writes:\n")
    for text in sample(
        model,
        tokenizer,
        ["def ", "import os\n"],
        max_new_tokens=64,
        sequence_length=config.data.sequence_length,
        device=backend.device,
    ):
        print("\n".join(f"  | {line}" for line in text.splitlines()), end="\n\n")


def _what_next(run_dir: Path, config: str) -> None:
    from trainer.checkpoint import newest

    print(f"Run directory  {run_dir}")
    print(f"  metrics      {run_dir}/metrics.jsonl and TensorBoard events")
    print(f"  checkpoint   {newest(run_dir)}")
    moebius = _moebius()
    print("Try next:")
    print(f"  {moebius} generate --run {run_dir} --prompt 'class '")
    print(f"  {moebius} plot {run_dir} --out loss.png")
    print(f"  {moebius} params --config {config}")


def _moebius() -> str:
    """The command as this shell finds it: `make train` runs it from an environment that is not activated."""
    folder = Path(sys.executable).parent
    found = shutil.which("moebius")
    if (found and Path(found).parent == folder) or not (folder / "moebius").exists():
        return "moebius"
    near = os.path.relpath(folder / "moebius")
    return str(folder / "moebius") if near.startswith("..") else near


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
