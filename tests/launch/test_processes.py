"""Processes that are started here end here, whatever they do."""

import os
import signal
import time
from pathlib import Path

import pytest

from launch import processes

ROOT = Path(__file__).resolve().parents[2]


def python(tmp_path: Path, code: str, name: str = "p"):
    """``python -c code`` by the same path as a module of ours."""
    (tmp_path / f"{name}.py").write_text(code)
    where = {**processes.environment(), "PYTHONPATH": str(tmp_path)}
    return processes.started(name, log=tmp_path / f"{name}.log", where=where)


FOREVER = "import time; time.sleep(600)"


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_exit_codes_and_logs(tmp_path):
    ended = [python(tmp_path, "print('well')", "a"), python(tmp_path, "raise SystemExit(3)", "b")]
    assert processes.exit_codes(ended, timeout=60, grace=60) == [0, 3]
    assert (tmp_path / "a.log").read_text() == "well\n"


def test_when_one_fails_the_others_end_after_their_grace(tmp_path):
    begin = time.monotonic()
    waiting = python(tmp_path, FOREVER, "a")
    assert processes.exit_codes([waiting, python(tmp_path, "1 / 0", "b")], 60, grace=0.2) == [processes.TIMED_OUT, 1]
    assert time.monotonic() - begin < 30 and is_gone(waiting.pid)


def test_a_time_limit_ends_what_they_started_too(tmp_path):
    """Each is a session of its own."""
    child = f"subprocess.Popen([sys.executable, '-c', {FOREVER!r}])"
    process = python(tmp_path, f"import subprocess, sys; print({child}.pid, flush=True)\n{FOREVER}")
    while not (tmp_path / "p.log").read_text().strip():
        time.sleep(0.02)
    assert processes.exit_codes([process], timeout=0.1, grace=0) == [processes.TIMED_OUT]
    child = int((tmp_path / "p.log").read_text())
    for _ in range(200):  # it is not ours to wait for
        if is_gone(child) or "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2][:3]:
            return
        time.sleep(0.02)
    pytest.fail(f"process {child} is left")


def test_progress_renews_the_limit(tmp_path):
    begin, calls = time.monotonic(), []

    def progress():
        calls.append(time.monotonic())
        return min(4, int((calls[-1] - begin) / 0.25))  # changes at 0.25, 0.5, 0.75 and 1 second

    codes = processes.exit_codes([python(tmp_path, FOREVER)], timeout=0.5, grace=0, progress=progress)
    assert codes == [processes.TIMED_OUT] and time.monotonic() - begin >= 1.4


def test_if_one_cannot_be_started_the_others_end(tmp_path):
    made = []

    def start():
        made.append(python(tmp_path, FOREVER))
        yield made[0]
        raise OSError("no more processes")

    with pytest.raises(OSError, match="no more"):
        processes.exit_codes(start(), timeout=60, grace=0)
    assert is_gone(made[0].pid)


def test_what_a_launcher_sets_is_not_inherited(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "7")
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & processes.environment().keys()
    places = processes.places(2)
    assert [place["RANK"] for place in places] == ["0", "1"] and len({place["MASTER_PORT"] for place in places}) == 1


def test_the_rank_to_blame_is_the_one_that_does_not_complain_of_another():
    logs = ["Connection closed by peer", "ZeroDivisionError", ""]
    assert processes.blamed([1, 1, processes.TIMED_OUT], logs) == 1
    assert processes.blamed([0, 0, -signal.SIGKILL], logs) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_command_ends_what_it_started(tmp_path, number):
    command = f"""
from pathlib import Path
from launch import processes
def ranks():
    yield processes.started("sleeper", log=Path("sleeper.log"), where={{"PYTHONPATH": {str(tmp_path)!r}}})
with processes.ended_by_signals():
    processes.exit_codes(ranks(), timeout=600, grace=0)
"""
    (tmp_path / "sleeper.py").write_text(f"import os; print(os.getpid(), flush=True)\n{FOREVER}")
    where = {**processes.environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    (tmp_path / "command.py").write_text(command)
    started = processes.started("command", log=tmp_path / "command.log", where=where, folder=tmp_path)
    log = tmp_path / "sleeper.log"
    while not (log.exists() and log.read_text().strip()):
        time.sleep(0.02)
    os.kill(started.pid, number)
    assert processes.exit_codes([started], timeout=60, grace=0) == [128 + number]
    assert is_gone(int(log.read_text()))
