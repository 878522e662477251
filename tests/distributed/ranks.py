"""Starts real processes: a free port each time, a time limit, and nothing left behind.

Ranks of :func:`run_ranks` are forked by one process that has imported torch and DeepSpeed, which spares each start five
seconds. Those of :func:`end_of_ranks`, which is for how a process ends, are processes as a launcher starts them.
"""

import faulthandler
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from launch import processes
from launch.processes import free_port, stop
from parallel import topology

ROOT = Path(__file__).resolve().parents[2]
__all__ = ["ROOT", "end_of_ranks", "environment", "free_port", "report", "run_alone", "run_ranks", "stop"]


def environment(**more: str) -> dict[str, str]:
    """This environment without what a launcher would have set, one thread a process."""
    return processes.environment(OMP_NUM_THREADS="1", PYTHONFAULTHANDLER="1", **more)


def run_ranks(world: int, module: str, *arguments: str, timeout: float = 240, fresh: bool = False) -> list[Any]:
    """Run ``python -m module *arguments`` on ``world`` ranks; the JSON that each wrote to the file named by $RESULT.

    ``fresh`` ranks are processes of their own: forked ones have DeepSpeed for the CPU.

    Fails with the output of the first rank that failed. Ranks that outlive the limit, or another's failure, are
    killed with everything they started.
    """
    with tempfile.TemporaryDirectory() as folder:
        ended = _ended(_started if fresh else _forked, world, (module, *arguments), timeout, grace=2, results=folder)
        codes = [code for code, _ in ended]
        if any(codes):
            blamed = processes.blamed(codes, [log for _, log in ended])
            raise AssertionError(f"rank {blamed} of exit codes {codes}:\n{ended[blamed][1][-6000:]}")
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(world)]


def end_of_ranks(world: int, module: str, *arguments: str, timeout: float, grace: float) -> list[tuple[int, str]]:
    """Exit code and output of every rank of ``python -m module *arguments``; none is left when this returns.

    Ranks have ``grace`` seconds to say what they saw when another has failed.
    """
    return _ended(_started, world, (module, *arguments), timeout, grace, results=os.devnull)


Start = Callable[[Sequence[str], dict[str, str], Path], processes.Process]


def _ended(
    start: Start, world: int, command: Sequence[str], timeout: float, grace: float, results: str
) -> list[tuple[int, str]]:
    """As :func:`end_of_ranks`; $RESULT is a file in ``results``."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(world)]
        ranks = (
            start(command, environment(RESULT=f"{results}/{place['RANK']}.json", **place), log)
            for place, log in zip(processes.places(world), logs, strict=True)
        )
        codes = processes.exit_codes(ranks, timeout, grace)
        return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def _started(command: Sequence[str], where: dict[str, str], log: Path) -> processes.Process:
    """A process as a launcher starts it."""
    return processes.started(*command, log=log, where=where, folder=ROOT)


class _Forked:
    """A forked process as `launch.processes` wants one."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self.kill, self.wait = process.kill, process.join

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode


def _forked(command: Sequence[str], where: dict[str, str], log: Path) -> processes.Process:
    """A child of the process that has what ranks import; that one is started once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    with mock.patch.dict(os.environ, environment(DS_ACCELERATOR="cpu"), clear=True):  # libgomp reads it when it loads
        multiprocessing.forkserver.ensure_running()
    process = context.Process(target=_be_rank, args=(command, where, log))
    process.start()
    return _Forked(process)


def _be_rank(command: Sequence[str], where: dict[str, str], log: Path) -> None:
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
