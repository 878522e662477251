"""From an exception to one line and an exit code."""

import os
import sys
import traceback
from collections.abc import Callable

UNREAD, LOST_PEER, USER_ERROR, INTERRUPTED = 1, 1, 2, 130


def run(command: Callable[[], int], debug: bool) -> int:
    """Run a command and return its exit code.

    A :class:`backends.errors.UserError` becomes one line on standard error and exit code 2; on several ranks only
    the first one speaks. A :class:`backends.errors.LostPeer` becomes one line, of any rank, and exit code 1. An
    interrupt gives exit code 130 and a reader that closed our output 1, both quietly. Any other exception is ours
    to mend and passes through.

    Args:
        command: does the work and returns its exit code.
        debug: show the traceback too, of every rank.
    """
    try:
        return written(command())
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        return INTERRUPTED
    except BrokenPipeError:
        return written(UNREAD)
    except Exception as error:
        from backends.errors import LostPeer, UserError  # brings torch in, which a command may not have needed

        if not isinstance(error, (LostPeer, UserError)):
            raise
        if debug:
            traceback.print_exc()
        if isinstance(error, LostPeer):
            if error.tell or debug:
                complain(str(error), every_rank=True)
            return LOST_PEER
        complain(str(error), every_rank=debug or error.unheard)
        return USER_ERROR


def written(code: int) -> int:
    """``code``, when all output is out; ``UNREAD`` if its reader has seen enough, as in `moebius info | head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it shuts down
        return UNREAD
    return code


def complain(problem: str, every_rank: bool = False) -> None:
    """Print ``moebius: <problem>`` on standard error as one line, on the first rank unless ``every_rank``."""
    if every_rank or os.environ.get("RANK", "0") == "0":
        print("moebius:", " ".join(problem.split()), file=sys.stderr)
