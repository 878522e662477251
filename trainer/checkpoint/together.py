"""What every rank does, and what all of them hear of if it fails on one."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from backends.errors import UserError

T = TypeVar("T")


def together(work: Callable[[], T]) -> T:
    """Run ``work`` on every rank, and go on when all have; every rank calls this.

    Its collective moves a line of text: gloo copies what is large with threads of its own.

    Raises:
        UserError: it failed on some rank. The message is the first such rank's, the same on every rank, so that none
            goes on and waits for another.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, _line(failure) if failure else None)
    first = next((line for line in told if line), None)
    if first:
        raise UserError(first) from failure
    return result


def _line(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"rank {dist.get_rank()}: {reason(error)}"


def reason(error: BaseException) -> str:
    """What went wrong at first: torch's writer complains of its own state where the disk was full."""
    while error.__context__ is not None:
        error = error.__context__
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
