"""Where a run lives and what it goes on from. Imports nothing heavy: what is wrong here is said at once."""

import os
from pathlib import Path

from backends.errors import UserError
from trainer.checkpoint.folder import located, starting_point, step_of
from trainer.config.schema import Config


def find_place(config: Config, resume: bool | str, may_start: bool) -> tuple[Path, Path | None]:
    """The run directory and the checkpoint that the run goes on from; None for a new run.

    Args:
        resume: whether to go on from the newest checkpoint; or the folder of the checkpoint to go on from.
        may_start: with ``resume``, start the run if it has no checkpoint yet.

    Raises:
        UserError: the directory could not be written, holds another run, or has no such checkpoint.
    """
    run_dir = run_dir_of(config)
    _check_writable(run_dir)
    if isinstance(resume, str):
        return run_dir, _named(run_dir, Path(resume))
    return run_dir, starting_point(run_dir, resume, may_start)


def run_dir_of(config: Config) -> Path:
    """Where the run lives."""
    return Path(config.run_dir or f"runs/{config.name}")


def _named(run_dir: Path, path: Path) -> Path:
    """The checkpoint that a person names to resume from; only one of the same run will do."""
    there = {found.resolve(): found for found in (run_dir / "checkpoints").glob("step-*")}
    if path.resolve() in there:
        return there[path.resolve()]
    listed = ", ".join(sorted(found.name for found in there.values()))
    remedy = f"give one of those in {run_dir}/checkpoints ({listed})" if there else "start without --resume"
    raise UserError(f"--resume: {path} is no checkpoint of {run_dir}; {remedy}")


def initial_checkpoint(config: Config, where: str) -> Path | None:
    """The checkpoint whose weights a new run starts from, if the config names one. Raises UserError if it is none."""
    place = config.checkpoint.initial
    if place is None:
        return None
    try:
        return located(Path(place).expanduser())
    except UserError as error:
        raise UserError(f"{where}: checkpoint.initial: {error}") from None


def way_on(damaged: Path, problem: str) -> str:
    """What to do instead, where a checkpoint is at fault and not the config."""
    if not problem.startswith(str(damaged)):
        return ""
    before = [path for path in damaged.parent.glob("step-*") if step_of(path) < step_of(damaged)]
    if not before:
        return "; there is none before it here: start anew with another name=..."
    return f"; or go on from that one: --resume {max(before, key=step_of)}"


def _check_writable(run_dir: Path) -> None:
    """Raise a :class:`UserError` if the run could not be written, before anything is."""
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"run_dir: {run_dir}: {there} is a file; choose another run_dir=...")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: {run_dir}: {there} may not be written to; choose another run_dir=...")
