"""Charts outside the run's own files: TensorBoard, and CSV and Weights & Biases through DeepSpeed's monitors."""

import csv
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backends.errors import UserError
from trainer.config.schema import MetricsConfig


def flatten(record: dict[str, Any], group: str) -> dict[str, float]:
    """``{"loss": 2.0, "times": {"data": 0.1}}`` in group "train": ``train/loss`` and ``times/data``.

    The step is left out: charts have it as their axis.
    """
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= _leaves(value, name)
        elif name != "step":
            flat[f"{group}/{name}"] = float(value)
    return flat


def _leaves(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{path}/{name}")
    else:
        yield path, float(value)


class TensorBoard:
    """Events in ``<run_dir>/tensorboard``; on resume TensorBoard hides what the interrupted run wrote later."""

    def __init__(self, run_dir: str, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always wanted

        purge = start_step + 1 if start_step else None
        self._writer = SummaryWriter(os.path.join(run_dir, "tensorboard"), purge_step=purge)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class DeepSpeedMonitors:
    """CSV files in ``<run_dir>/csv`` and Weights & Biases, as DeepSpeed writes them.

    Needs ``deepspeed.init_distributed`` to have run.

    Raises:
        UserError: Weights & Biases does not start.
    """

    def __init__(self, run_dir: str, name: str, config: MetricsConfig, start_step: int) -> None:
        from deepspeed.monitor.config import DeepSpeedMonitorConfig
        from deepspeed.monitor.monitor import MonitorMaster

        settings = {
            "csv_monitor": {"enabled": config.csv, "output_path": run_dir, "job_name": "csv"},
            "wandb": {"enabled": config.wandb, "project": config.wandb_project, "group": name},
        }
        try:
            self._monitor = MonitorMaster(DeepSpeedMonitorConfig(**settings))
        except Exception as error:  # whatever wandb.init raises: no login, no network
            if not config.wandb:
                raise
            problem = f"{type(error).__name__}: {error}"
            remedy = "run `wandb login`, set WANDB_MODE=offline, or set metrics.wandb=false"
            raise UserError(f"metrics.wandb: Weights & Biases does not start ({problem}); {remedy}") from error
        if config.csv:
            # The monitor would write a second header, and rows that the interrupted run has already written.
            self._monitor.csv_monitor.filenames += _cut_csv(Path(run_dir, "csv"), start_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._monitor.write_events([(name, value, step) for name, value in values.items()])

    def close(self) -> None:
        if self._monitor.wandb_monitor is not None:
            import wandb

            wandb.finish()


def check_installed(config: MetricsConfig, where: str) -> None:
    """Raise :class:`UserError` if something that ``metrics`` switches on is not installed; for every rank to call.

    Args:
        config: the ``metrics`` section.
        where: the config file, for the message.
    """
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"{where}: metrics.wandb: wandb is not installed; `pip install wandb`, or set metrics.wandb=false"
        )


def _cut_csv(folder: Path, start_step: int) -> list[str]:
    """Drop rows after ``start_step``; the names, without suffix, of the files that are there."""
    names = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= start_step)])
        names.append(path.stem)
    return names
