"""What to say when the job ends because a process of it is gone: how far it came, and how it goes on."""

import os
from pathlib import Path

from backends.errors import LostPeer
from parallel.failures import is_lost_peer
from trainer.checkpoint.folder import newest, step_of

_TOLD = ".lost"  # in the run directory, which all ranks share: whoever makes it speaks for all


def forget(run_dir: Path) -> None:
    """Let the next failure be told again; for one rank, before the others go on."""
    (run_dir / _TOLD).unlink(missing_ok=True)


def explain_lost_peer(error: RuntimeError, run_dir: Path, step: int | None) -> None:
    """Raise :class:`LostPeer` if that is what ``error`` means.

    Args:
        step: steps done; None while the run was being prepared.
    """
    if not is_lost_peer(error):
        return
    when = "before the first step" if step is None else f"during step {step + 1}"
    last = newest(run_dir)
    if last:
        remedy = f"the newest complete checkpoint is step {step_of(last)}; start again with --resume"
    else:
        remedy = "there is no checkpoint yet; start again with --auto-resume"
    message = f"rank {os.environ.get('RANK', '0')} lost another process {when}; {remedy}"
    raise LostPeer(message, tell=step is None or _first(run_dir / _TOLD, message)) from error


def _first(told: Path, message: str) -> bool:
    try:
        with told.open("x") as file:
            file.write(message + "\n")
    except FileExistsError:
        return False
    except OSError:
        return True  # better twice than not at all
    return True
