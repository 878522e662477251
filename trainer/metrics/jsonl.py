"""metrics.jsonl: one JSON object a line, each step once however often the run was interrupted."""

import json
import math
import os
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


class JsonLines:
    """Appends records; what an interrupted run wrote after ``start_step`` is cut first.

    Args:
        run_dir: the run directory, which exists.
        start_step: steps that the run already has; 0 for a new one.
    """

    def __init__(self, run_dir: str, start_step: int) -> None:
        path = Path(run_dir, FILE_NAME)
        kept = [record for record in read(path) if record.get("step", 0) <= start_step] if path.exists() else []
        partial = path.with_suffix(".partial")  # a run killed here still has its whole file
        partial.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """One record; numbers that JSON has no word for (NaN, infinity) become null."""
        self._file.write(_line(record))

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without a last line that was cut off by a crash."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same dictionaries and lists, with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
