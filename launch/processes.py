"""Ranks on this machine without a launcher: a free port, a time limit, and nothing left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol

TIMED_OUT = 124
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ROOT = Path(__file__).resolve().parents[1]


class Process(Protocol):
    """As much of ``subprocess.Popen`` as is needed."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> Optional[int]: ...

    def kill(self) -> None: ...

    def wait(self) -> Any: ...


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(**more: str) -> dict[str, str]:
    """This environment without what a launcher would have set; it finds the packages that are running here."""
    inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    return {**inherited, "PYTHONPATH": str(_ROOT), **more}


def places(world: int) -> list[dict[str, str]]:
    """What a launcher tells each rank of this machine."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(world)]


def started(module: str, *arguments: str, log: Path, where: dict[str, str], folder: Optional[Path] = None) -> Process:
    """``python -m module *arguments`` in a session of its own, its output in ``log``."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env=where,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def exit_codes(
    processes: Iterable[Process], timeout: float, grace: float, progress: Callable[[], Any] = lambda: None
) -> list[int]:
    """Wait for processes, and end all that are left; none is when this returns.

    When one has failed the others have ``grace`` seconds left, as they may wait for it for ever.

    Args:
        processes: are started as they are taken from this; if one cannot be, the others end, too.
        timeout: seconds from now and from every change of what ``progress()`` gives.

    Returns:
        their exit codes, ``TIMED_OUT`` of those that did not end in time.
    """
    running: list[Process] = []
    try:
        for process in processes:
            running.append(process)
        seen, end, failed = progress(), time.monotonic() + timeout, False
        while time.monotonic() < end and None in (codes := [process.poll() for process in running]):
            if any(codes) and not failed:
                failed, end = True, min(end, time.monotonic() + grace)
            elif not failed and (now := progress()) != seen:
                seen, end = now, time.monotonic() + timeout
            time.sleep(0.02)
        return [TIMED_OUT if (code := process.poll()) is None else code for process in running]
    finally:
        for process in running:
            stop(process)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside this, SIGTERM and a closed terminal end this process as Ctrl-C does: what is started is ended first."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(process: Process) -> None:
    """Kill a process and its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have come as far as a session of its own
    process.wait()


def blamed(codes: Sequence[int], logs: Sequence[str]) -> int:
    """The rank that failed first: others fail because one left, and their logs complain of another."""
    failed = [rank for rank, code in enumerate(codes) if code]
    return min(failed, key=lambda rank: ("closed by peer" in logs[rank], codes[rank] == TIMED_OUT))
