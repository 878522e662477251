"""The checkpoint folders of a run: their names, how one becomes visible, and which ones stay.

``RUN_DIR/checkpoints/step-000200/`` is complete: it was written under a hidden name, put on the disk, and renamed.
The newest is the one with the highest step. There is no pointer file that could be wrong. Whatever else lies there
has a name that begins with a dot: the save under way, or what a killed one left.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backends.errors import UserError

FOLDER, STATE, CONFIG, TOKENIZER = "checkpoints", "trainer.json", "config.yaml", "tokenizer.json"
_NAME = re.compile(r"step-(\d{6,})")


def newest(run_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, if there is one."""
    found = complete(run_dir)
    return found[-1] if found else None


def located(place: str | Path) -> Path:
    """The checkpoint folder ``place``, or the newest one of the run directory ``place``.

    Raises:
        UserError: there is none.
    """
    path = Path(place)
    checkpoint = path if (path / STATE).is_file() else newest(path)
    if checkpoint is None:
        raise UserError(f"{place}: holds no checkpoint; give a run directory or a folder inside its checkpoints/")
    return checkpoint


def complete(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, by step."""
    folder = Path(run_dir) / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def unfinished(run_dir: str | Path) -> list[Path]:
    """Saves under way, and what killed ones left."""
    return sorted((Path(run_dir) / FOLDER).glob(".step-*"))


def superseded(run_dir: str | Path) -> list[Path]:
    """Checkpoints that were set aside, because the run went on from an earlier one."""
    return sorted((Path(run_dir) / FOLDER).glob("superseded-step-*"))


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which it was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, "checkpoint folders are named by their step"
    return int(match[1])


def starting_point(run_dir: Path, resume: bool, may_start: bool) -> Path | None:
    """The checkpoint that a run goes on from; None for a new run.

    Args:
        resume: go on with the run that is there.
        may_start: with ``resume``, start a new run when there is no checkpoint yet.

    Raises:
        UserError: there is none although there has to be one; or the directory has something in it that a new run
            would mix with.
    """
    found = newest(run_dir)
    if resume and (found is not None or may_start and _ours(run_dir)):
        return found
    if resume and not may_start:
        raise UserError(f"{run_dir}: has no checkpoint to resume from; start without --resume")
    if run_dir.exists() and any(run_dir.iterdir()):
        hint = "add --resume to go on with it, or " if found else ""
        raise UserError(f"{run_dir}: this run directory exists; {hint}choose another run_dir=... or name=...")
    return None


def _ours(run_dir: Path) -> bool:
    """Whether a run that was killed before its first checkpoint left this: it writes its config first."""
    return (run_dir / CONFIG).is_file()


def begin(run_dir: str | Path, step: int) -> None:
    """Make the hidden folder of a new checkpoint, and remove what killed saves left."""
    for path in unfinished(run_dir):
        shutil.rmtree(path)
    partial(run_dir, step).mkdir(parents=True)


def partial(run_dir: str | Path, step: int) -> Path:
    """The hidden folder that a checkpoint is written into."""
    return Path(run_dir) / FOLDER / f".step-{step:06d}.partial"


def publish(run_dir: str | Path, step: int) -> Path:
    """Make the checkpoint visible, at once; everything in it is on the disk already.

    Checkpoints of this or a higher step were written before the run was resumed from an earlier one. They are set
    aside first, or the newest would be one of another history.
    """
    hidden = partial(run_dir, step)
    for path in complete(run_dir):
        if step_of(path) >= step:
            aside = path.with_name(f"superseded-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
    final = hidden.with_name(f"step-{step:06d}")
    os.rename(hidden, final)
    sync(final.parent)
    return final


def check_vacant(target: Path) -> None:
    """Raise a :class:`UserError` if there is something already."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists; choose another folder")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, which gets that name at once when all is in it, and goes when that fails.

    Raises:
        UserError: ``target`` exists, or could not be written.
    """
    check_vacant(target)
    hidden = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(hidden, ignore_errors=True)  # of a killed process
        hidden.mkdir(parents=True)
        yield hidden
        sync(hidden)
        os.rename(hidden, target)
        sync(target.parent)
    except Exception as error:
        found: BaseException | None = error
        while found and not isinstance(found, (OSError, UserError)):
            found = found.__context__  # torch's writer complains of its own state where the disk was full
        if not isinstance(found, OSError):
            raise
        raise UserError(f"{target}: cannot be written ({found.strerror or found}); choose another folder") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def thin_out(run_dir: str | Path, keep: int, keep_every: int) -> None:
    """Remove all but the ``keep`` newest (0 keeps all) and those whose step is a multiple of ``keep_every``."""
    for path in complete(run_dir)[:-keep] if keep else []:
        if not keep_every or step_of(path) % keep_every:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)  # at no moment does a folder of a checkpoint's name miss files
    shutil.rmtree(doomed, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the list of a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
