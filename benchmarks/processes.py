"""The other end of ``benchmarks/worker.py``: starts a contender's process and asks it for one step at a time."""

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any


class Process:
    """A contender. After a failure it answers with nothing, and ``failure`` says in one line what happened."""

    def __init__(self, job: dict[str, Any], python: str, environment: dict[str, str], root: Path) -> None:
        self.failure: str | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**environment, "PYTHONPATH": str(root)},
        )
        self._send(json.dumps(job))

    def wait_ready(self) -> None:
        """Until it has built its model, or failed to."""
        self._receive()

    def ask(self, command: str) -> dict[str, Any]:
        """Its answer to a command, empty after a failure."""
        if self.failure is not None:
            return {}
        self._send(command)
        return self._receive()

    def close(self) -> None:
        """End it."""
        self._process.kill()  # it has nothing to save, and may be in the middle of a step of minutes
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def _send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # reading tells why
            print(line, file=self._process.stdin, flush=True)

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        answer = json.loads(line) if line else {"error": self._last_words()}
        self.failure = answer.get("error")
        return {} if self.failure is not None else answer

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"ended with exit code {self._process.returncode}" + (f": {lines[-1]}" if lines else "")
