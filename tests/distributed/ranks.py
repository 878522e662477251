"""Starts real processes: a free port each time, a time limit, and nothing left behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
        ended = end_of_ranks(world, module, *arguments, timeout=timeout, results=folder)
        codes = [code for code, _ in ended]
        if any(codes):
            # Others fail because one left: it is the one whose log does not complain of another.
            failed = [rank for rank, code in enumerate(codes) if code]
            blamed = min(failed, key=lambda rank: ("closed by peer" in ended[rank][1], codes[rank] == TIMED_OUT))
            raise AssertionError(f"rank {blamed} of exit codes {codes}:\n{ended[blamed][1][-6000:]}")
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(world)]


def end_of_ranks(
    world: int, module: str, *arguments: str, timeout: float = 240, grace: float = 2, results: str = os.devnull
) -> list[tuple[int, str]]:
    """Exit code and output of every rank of ``python -m module *arguments``; none is left when this returns.

    Ranks have ``grace`` seconds to say what they saw when another has failed. $RESULT is a file in ``results``.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = str(free_port())
        processes = []
        for rank in range(world):
            where = environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                RESULT=f"{results}/{rank}.json",
            )
            with open(f"{folder}/{rank}.log", "wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *arguments],
                        cwd=ROOT,
                        env=where,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        try:
            codes = _wait(processes, timeout, grace)
        finally:
            for process in processes:
                stop(process)
        return [(code, Path(f"{folder}/{rank}.log").read_text()) for rank, code in enumerate(codes)]


def _wait(processes: list[subprocess.Popen], timeout: float, grace: float) -> list[int]:
    """Exit codes; returns soon after a rank has failed, as the others may wait for it for ever."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            end = min(end, time.monotonic() + grace)
        time.sleep(0.05)
    return [TIMED_OUT if process.poll() is None else process.returncode for process in processes]


def stop(process: subprocess.Popen) -> None:
    """Kill a process and its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
