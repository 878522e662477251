"""What a person watching the run sees: a progress line on a terminal, plain lines in a file or pipe."""

import sys
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from trainer.metrics.units import duration, si

_COLUMNS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", lambda value: f"loss {value:7.4f}"),
    ("grad_norm", lambda value: f"grad {value:7.3f}"),
    ("lr", lambda value: f"lr {value:.2e}"),
    ("tokens_per_second", lambda value: f"{si(value):>5} tok/s"),
    ("mfu", lambda value: f"MFU {100 * value:4.1f}%"),
    ("memory_gib", lambda value: f"{value:6.2f} GiB"),
    ("seconds_left", lambda value: f"left {duration(value):>7}"),
)


def describe(record: dict[str, Any]) -> str:
    """The figures of a step record that fit on one line, in aligned columns; those it lacks are left out."""
    return "  ".join(show(record[name]) for name, show in _COLUMNS if record.get(name) is not None)


def describe_evaluation(record: dict[str, Any]) -> str:
    """An evaluation record in words: every number in it, by name."""
    return "  ".join(
        f"{name.replace('_', ' ')} {value:.4f}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in record.items()
        if name != "step"
    )


class Lines:
    """One line a record, for files and pipes."""

    def __init__(self, total_steps: int, start_step: int, stream: TextIO) -> None:
        self._total, self._stream = total_steps, stream
        if start_step:
            self.message(f"resuming after step {start_step}")

    def step(self, record: dict[str, Any]) -> None:
        self.message(f"step {record['step']:>{len(str(self._total))}}/{self._total}  {describe(record)}")

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class ProgressLine:
    """One line that rewrites itself at the bottom of a terminal; messages scroll above it."""

    def __init__(self, total_steps: int, start_step: int, stream: TextIO) -> None:
        line = TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        steps = TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True))
        self._progress = Progress(
            BarColumn(bar_width=12), steps, line, console=Console(file=stream), expand=True, refresh_per_second=4
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_step, line="first step ...")
        self._progress.start()
        # Rich hides the cursor until it is stopped, which a process that is killed never does.
        self._progress.console.show_cursor(True)

    def step(self, record: dict[str, Any]) -> None:
        self._progress.update(self._task, completed=record["step"], line=describe(record))

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def open_screen(total_steps: int, start_step: int, stream: TextIO | None = None) -> Lines | ProgressLine:
    """The progress line if ``stream`` (default: standard output) is a terminal, plain lines otherwise."""
    stream = stream or sys.stdout
    return (ProgressLine if stream.isatty() else Lines)(total_steps, start_step, stream)
