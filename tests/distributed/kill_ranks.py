"""Runs a training job again and again, kills one of its ranks at a chosen kind of moment, and reports how it ended.

One process imports everything and forks the ranks of each attempt, so that a start costs a second instead of eight.
The ranks run the real command. Argument: a JSON list of attempts, ``{"ranks", "arguments", "run_dir", "kill"}``.
``kill`` is empty for an attempt that is left alone, or

- ``start``: within the first seconds, while ranks meet and build the model
- ``step``: some steps later, anywhere in a step
- ``save``: while a checkpoint is being written
- ``saved``: right after a checkpoint became visible
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401

import trainer.loop  # noqa: F401
from launch import train
from tests.distributed.ranks import free_port, report
from trainer.checkpoint.folder import newest, unfinished

_LIMIT = 120.0  # seconds for a job to reach the moment, or to end after it
_SUPERVISOR = 3.0  # seconds after which a supervisor would end ranks that wait for one that never came


def main() -> None:
    draw = random.Random(0)
    report([_attempt(draw=draw, **attempt) for attempt in json.loads(sys.argv[1])])


def _attempt(ranks: int, arguments: list[str], run_dir: str, kill: str, draw: random.Random) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        job = {_fork(rank, ranks, port, arguments, folder): rank for port in [free_port()] for rank in range(ranks)}
        codes: dict[int, int] = {}
        victim = draw.randrange(ranks) if kill and _wait_for(kill, Path(run_dir), draw, job, codes) else None
        killed_at = time.monotonic()
        for pid, rank in job.items():
            if rank == victim:
                os.kill(pid, signal.SIGKILL)
        ended = [False] * 2
        while len(codes) < ranks and not all(ended):
            _collect(job, codes)
            waited = time.monotonic() - killed_at
            limits = (kill == "start" and waited > _SUPERVISOR, waited > _LIMIT)
            for index, number in enumerate((signal.SIGTERM, signal.SIGKILL)):
                if limits[index] and not ended[index]:
                    ended[index] = True
                    for pid in [pid for pid, rank in job.items() if rank not in codes]:
                        os.kill(pid, number)
            time.sleep(0.002)
        text = "".join(Path(folder, str(rank)).read_text() for rank in range(ranks))
        return {
            "victim": victim,
            "codes": [codes.get(rank, -signal.SIGKILL) for rank in range(ranks)],
            "seconds": time.monotonic() - killed_at,
            "lines": [line for line in text.splitlines() if line.startswith("moebius: ")],
            "log": text[-6000:],
        }


def _fork(rank: int, ranks: int, port: int, arguments: list[str], folder: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        log = os.open(f"{folder}/{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in places.items()})
        code = train.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait_for(kind: str, run_dir: Path, draw: random.Random, job: dict[int, int], codes: dict[int, int]) -> bool:
    """Until the moment has come; False if the job ended before."""
    began, first, before = time.monotonic(), _last_step(run_dir), newest(run_dir)
    steps = draw.randint(1, 5)
    late = {"start": 2.0, "step": 0.1, "save": 0.04, "saved": 0.02}[kind]
    while len(codes) < len(job):
        assert time.monotonic() - began < _LIMIT, f"the job does not come to a {kind}"
        there = {
            "start": lambda: True,
            "step": lambda: _last_step(run_dir) >= first + steps,
            "save": lambda: any(path.name.endswith(".partial") and path.is_dir() for path in unfinished(run_dir)),
            "saved": lambda: newest(run_dir) != before,
        }[kind]()
        if there:
            time.sleep(draw.uniform(0, late))
            _collect(job, codes)
            return len(codes) < len(job)
        _collect(job, codes)
        time.sleep(0.001)
    return False


def _last_step(run_dir: Path) -> int:
    """The last step that was recorded, or that a checkpoint has: what was recorded after it is cut on resume."""
    saved = newest(run_dir)
    cut = int(saved.name.partition("-")[2]) if saved else 0
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max([cut, *(json.loads(line).get("step", 0) for line in lines if line.endswith("}"))])


def _collect(job: dict[int, int], codes: dict[int, int]) -> None:
    for pid, rank in job.items():
        if rank not in codes:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
