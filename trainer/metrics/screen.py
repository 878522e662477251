"""What a person watching the run sees: a progress line on a terminal, plain lines in a file or pipe."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from trainer.metrics.units import duration, si

# What matters most comes first: a narrow terminal shows as many as fit.
_COLUMNS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", lambda value: f"loss {value:7.4f}"),
    ("seconds_left", lambda value: f"left {duration(value):>7}"),
    ("tokens_per_second", lambda value: f"{si(value):>5} tok/s"),
    ("mfu", lambda value: f"MFU {100 * value:4.1f}%"),
    ("grad_norm", lambda value: f"grad {value:7.3f}"),
    ("lr", lambda value: f"lr {value:.2e}"),
    ("memory_gib", lambda value: f"{value:6.2f} GiB"),
)
_GAP = "  "


def figures(record: dict[str, Any], total_steps: int) -> list[str]:
    """The figures of a step record for one line, each of its own width; those it lacks are left out.

    The loss is the language model's alone where that was recorded, as it is in validation.
    """
    record = {**record, "loss": record.get("lm_loss", record.get("loss"))}
    step = f"step {record['step']:>{len(str(total_steps))}}/{total_steps}"
    return [step, *(show(record[name]) for name, show in _COLUMNS if record.get(name) is not None)]


def describe_evaluation(record: dict[str, Any]) -> str:
    """An evaluation record in words: every number in it, by name."""
    return "  ".join(
        f"{name.replace('_', ' ')} {value:.4f}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in record.items()
        if name != "step"
    )


class Lines:
    """One line a record, for files and pipes."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        self._total, self._stream = total_steps, stream

    def step(self, record: dict[str, Any]) -> None:
        self.message(_GAP.join(figures(record, self._total)))

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


@dataclass
class _Fitted:
    """As many of the parts as the width allows, the first ones first."""

    parts: list[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self.parts[0]
        for part in self.parts[1:]:
            if len(shown + _GAP + part) > options.max_width:
                break
            shown += _GAP + part
        yield Text(shown, no_wrap=True, overflow="crop", end="")


class _Figures(ProgressColumn):
    def render(self, task: Task) -> _Fitted:
        return _Fitted(task.fields["parts"])


class ProgressLine:
    """One line that rewrites itself at the bottom of a terminal; messages scroll above it."""

    def __init__(self, total_steps: int, start_step: int, stream: TextIO) -> None:
        self._total = total_steps
        self._progress = Progress(
            _Figures(Column(ratio=1)), console=Console(file=stream), expand=True, refresh_per_second=4
        )
        parts = [*figures({"step": start_step}, total_steps), "the next one is running ..."]
        self._task = self._progress.add_task("", total=None, parts=parts)
        self._progress.start()
        # Rich hides the cursor until it is stopped, which a process that is killed never does.
        self._progress.console.show_cursor(True)

    def step(self, record: dict[str, Any]) -> None:
        self._progress.update(self._task, parts=figures(record, self._total))

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def open_screen(total_steps: int, start_step: int, stream: TextIO | None = None) -> Lines | ProgressLine:
    """The progress line if ``stream`` (default: standard output) is a terminal, plain lines otherwise."""
    stream = stream or sys.stdout
    return ProgressLine(total_steps, start_step, stream) if stream.isatty() else Lines(total_steps, stream)
