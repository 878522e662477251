"""Starts real processes: a free port each time, a time limit, and nothing left behind.

Ranks of :func:`run_ranks` are forked by one process that has imported torch and DeepSpeed, which spares each start five
seconds. Those of :func:`end_of_ranks`, which is for how a process ends, are processes as a launcher starts them.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from parallel import topology

ROOT = Path(__file__).resolve().parents[2]
TIMED_OUT = 124


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """This environment without what a launcher would have set, one thread a process."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **more}


def run_ranks(world: int, module: str, *arguments: str, timeout: float = 240) -> list[Any]:
    """Run ``python -m module *arguments`` on ``world`` ranks; the JSON that each wrote to the file named by $RESULT.

    Fails with the output of the first rank that failed. Ranks that outlive the limit, or another's failure, are
    killed with everything they started.
    """
    with tempfile.TemporaryDirectory() as folder:
        ended = _ended(_forked, world, (module, *arguments), timeout, grace=2, results=folder)
        codes = [code for code, _ in ended]
        if any(codes):
            # Others fail because one left: it is the one whose log does not complain of another.
            failed = [rank for rank, code in enumerate(codes) if code]
            blamed = min(failed, key=lambda rank: ("closed by peer" in ended[rank][1], codes[rank] == TIMED_OUT))
            raise AssertionError(f"rank {blamed} of exit codes {codes}:\n{ended[blamed][1][-6000:]}")
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(world)]


def end_of_ranks(world: int, module: str, *arguments: str, timeout: float, grace: float) -> list[tuple[int, str]]:
    """Exit code and output of every rank of ``python -m module *arguments``; none is left when this returns.

    Ranks have ``grace`` seconds to say what they saw when another has failed.
    """
    return _ended(_started, world, (module, *arguments), timeout, grace, results=os.devnull)


Rank = subprocess.Popen | ForkServerProcess
Start = Callable[[Sequence[str], dict[str, str], str], Rank]


def _ended(
    start: Start, world: int, command: Sequence[str], timeout: float, grace: float, results: str
) -> list[tuple[int, str]]:
    """As :func:`end_of_ranks`; $RESULT is a file in ``results``."""
    with tempfile.TemporaryDirectory() as folder:
        port = str(free_port())
        ranks: list[Rank] = []
        for rank in range(world):
            where = environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                RESULT=f"{results}/{rank}.json",
            )
            ranks.append(start(command, where, f"{folder}/{rank}.log"))
        try:
            codes = _wait(ranks, timeout, grace)
        finally:
            for process in ranks:
                stop(process)
        return [(code, Path(f"{folder}/{rank}.log").read_text()) for rank, code in enumerate(codes)]


def _started(command: Sequence[str], where: dict[str, str], log: str) -> Rank:
    """A process as a launcher starts it."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=where,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _forked(command: Sequence[str], where: dict[str, str], log: str) -> Rank:
    """A child of the process that has what ranks import; that one is started once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    with mock.patch.dict(os.environ, environment(DS_ACCELERATOR="cpu"), clear=True):  # libgomp reads it when it loads
        multiprocessing.forkserver.ensure_running()
    process = context.Process(target=_be_rank, args=(command, where, log))
    process.start()
    return process


def _be_rank(command: Sequence[str], where: dict[str, str], log: str) -> None:
    """``python -m command``, in a session of its own."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(where)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _wait(ranks: list[Rank], timeout: float, grace: float) -> list[int]:
    """Exit codes; returns soon after a rank has failed, as the others may wait for it for ever."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and None in (codes := [_code(rank) for rank in ranks]):
        if any(codes):
            end = min(end, time.monotonic() + grace)
        time.sleep(0.02)
    return [TIMED_OUT if (code := _code(rank)) is None else code for rank in ranks]


def _code(rank: Rank) -> int | None:
    return rank.poll() if isinstance(rank, subprocess.Popen) else rank.exitcode


def stop(process: Rank) -> None:
    """Kill a process and its session."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have come as far as a session of its own
    process.wait() if isinstance(process, subprocess.Popen) else process.join()


def run_alone(command: list[str], folder: Path, env: dict[str, str], timeout: float = 120) -> tuple[int, str]:
    """Exit code and output, errors included, of a command that leaves nothing running behind."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        stop(process)
    return process.returncode, output


def report(value: Any) -> None:
    """What a rank hands back to :func:`run_ranks`, at its end: it leaves its groups.

    A gloo thread that is still dropping a tensor when the interpreter ends would abort the process.
    """
    topology.stop()
    Path(os.environ["RESULT"]).write_text(json.dumps(value))
