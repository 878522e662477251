"""The loss curve of a run, drawn from its metrics.jsonl."""

import math
from pathlib import Path
from typing import Any

from backends.errors import UserError
from trainer.metrics.figure import new_figure, save
from trainer.metrics.jsonl import FILE_NAME, read

Point = tuple[int, float]


def plot_losses(run_dir: str, out: str, title: str = "") -> None:
    """Draw training loss, validation loss and the bigram baseline over steps into a PNG, SVG or PDF file.

    Raises:
        UserError: matplotlib is not installed, the run has no metrics yet, or ``out`` cannot be written.
    """
    train, validation, bigram = curves(run_dir)
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db8d9", linewidth=0.9, label="training")
    if validation:
        label = f"validation ({validation[-1][1]:.2f})"
        axes.plot(*zip(*validation, strict=True), "o-", color="#1f4e8c", linewidth=1.6, markersize=3.5, label=label)
    if bigram is not None:
        label = f"bigram model ({bigram:.2f})"
        axes.axhline(bigram, color="#c0504d", linewidth=1.2, linestyle="--", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    save(figure, out)


def curves(run_dir: str) -> tuple[list[Point], list[Point], float | None]:
    """(step, loss) in training and in validation, and the bigram model's loss if there is one, in nats per token.

    Training gives the language-model loss alone, which is what validation measures, where it was recorded.

    Raises:
        UserError: the run has no metrics yet.
    """
    path = Path(run_dir, FILE_NAME)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give the directory of a run that has started")
    records = read(path)
    train = _series(records, "lm_loss") or _series(records, "loss")
    validation = _series(records, "validation_loss")
    if not train and not validation:
        raise UserError(f"{path}: holds no losses yet; wait for the first step")
    baselines = [record["bigram_loss"] for record in records if record.get("bigram_loss") is not None]
    return train, validation, baselines[-1] if baselines else None


def _series(records: list[dict[str, Any]], name: str) -> list[Point]:
    """(step, value) of the records that have a finite value."""
    return [
        (record["step"], record[name])
        for record in records
        if "step" in record and record.get(name) is not None and math.isfinite(record[name])
    ]
