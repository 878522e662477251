"""Training: what `moebius train`, the deepspeed launcher and torchrun start."""

import os
import shlex
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # started as a file: the launcher puts launch/ on the path, not the folder above it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.arguments import DRY_RUN, train_parser
from launch.errors import run

if TYPE_CHECKING:
    from trainer.setup import Run


def main(argv: list[str]) -> int:
    """Train the model of ``--config`` to its last step."""
    parser = train_parser()
    args = parser.parse(argv)
    given = {name: value for name in DRY_RUN if (value := getattr(args, name)) is not None}
    if args.dry_run:
        if args.resume or args.auto_resume or args.sample:
            parser.error("--dry-run trains nothing: it takes neither --resume, --auto-resume nor --sample")
        from launch.dry_run import dry_run

        return run(lambda: dry_run(args.config, args.overrides, **given), args.debug)
    if given:
        parser.error(f"--{next(iter(given)).replace('_', '-')} is of --dry-run")
    return run(lambda: _train(args.config, args.overrides, args.resume, args.auto_resume, args.sample), args.debug)


def _train(path: str, overrides: list[str], resume: bool | str, auto_resume: bool, sample: bool) -> int:
    from trainer.config.load import load_with_origins
    from trainer.place import find_place, run_dir_of

    with _company():
        config, origins = load_with_origins(path, overrides)
        with origins.named():
            find_place(config, resume or auto_resume, auto_resume)  # a mistake here need not wait for torch

        from launch.banner import banner
        from launch.show import announce
        from parallel.topology import stop
        from trainer.data import beginnings
        from trainer.loop import Loop
        from trainer.restart import explain_lost_peer
        from trainer.setup import prepare

        announce()
        prepared = None
        with origins.named():
            try:
                prepared = prepare(config, path, resume or auto_resume, may_start=auto_resume)
                if prepared.topology.is_main:
                    print(banner(prepared), flush=True)
                finished = Loop(prepared).train()
            except RuntimeError as error:
                explain_lost_peer(error, run_dir_of(config), prepared.step if prepared else None)
                raise
            finally:
                stop()
    if finished and prepared.topology.is_main:
        prompts = beginnings(prepared.validation, prepared.tokenizer, 3)
        if sample:
            _sample(prepared, prompts)
        _what_next(prepared.run_dir, path, prompts)
    return 0


def _company() -> AbstractContextManager[None]:
    """Several processes give up together; one alone need not wait for torch to hear of a mistake in its config."""
    if "RANK" not in os.environ:
        return nullcontext()
    from parallel.agreement import together

    return together()


def _sample(run: "Run", prompts: list[str]) -> None:
    """A few lines from the trained model."""
    from trainer.checkpoint import load_for_inference
    from trainer.generate import sample

    model, tokenizer, config = load_for_inference(str(run.run_dir), run.backend)
    print("\nA sample of what the model writes, after the beginnings of held-out documents:\n")
    for text in sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=48,
        sequence_length=config.data.sequence_length,
        device=run.backend.device,
    ):
        print("\n".join(f"  | {line}" for line in text.splitlines()), end="\n\n")


def _what_next(run_dir: Path, config: str, prompts: list[str]) -> None:
    from trainer.checkpoint import newest

    print(f"Run directory  {run_dir}")
    print(f"  metrics      {run_dir}/metrics.jsonl and TensorBoard events")
    print(f"  checkpoint   {newest(run_dir)}")
    moebius = _moebius()
    print("Try next:")
    print(f"  {moebius} generate --run {run_dir} --prompt {shlex.quote(prompts[0] if prompts else '')}")
    print(f"  {moebius} eval --run {run_dir}")
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
