"""Where the loop hands its figures: the screen, metrics.jsonl and the charts that are switched on."""

from types import TracebackType
from typing import Any, TextIO

from trainer.config.schema import Config
from trainer.metrics.charts import DeepSpeedMonitors, TensorBoard, flatten
from trainer.metrics.jsonl import JsonLines
from trainer.metrics.screen import describe_evaluation, open_screen


class Recorder:
    """Writes records on the main rank and nothing on the others. Close it, or use it in a ``with``.

    Args:
        run_dir: the run directory, which exists.
        config: the run; ``config.metrics`` chooses the charts.
        is_main: whether this is the one rank that writes.
        total_steps: the step at which the run ends.
        start_step: the step that a resumed run goes on from; what was recorded after it is cut.
        stream: where the screen's lines go; default standard output.

    Raises:
        UserError: something that ``config.metrics`` switches on does not start; nothing has been written then. What
            is not installed is better refused earlier, by :func:`trainer.metrics.charts.check_installed`.
    """

    def __init__(
        self,
        run_dir: str,
        config: Config,
        is_main: bool,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self._is_main = is_main
        if not is_main:
            return
        self._charts: list[TensorBoard | DeepSpeedMonitors] = []
        if config.metrics.csv or config.metrics.wandb:
            self._charts.append(DeepSpeedMonitors(run_dir, config.name, config.metrics, start_step))
        if config.metrics.tensorboard:
            self._charts.append(TensorBoard(run_dir, start_step))
        self._lines = JsonLines(run_dir, start_step)
        self._screen = open_screen(total_steps, start_step, stream)

    def step(self, record: dict[str, Any]) -> None:
        """One training step; call it every ``train.log_every`` steps.

        Args:
            record: ``step`` (from 1), and any of ``loss``, ``lm_loss``, ``mtp_loss``, ``aux_loss``, ``z_loss``,
                ``grad_norm``, ``lr``, ``tokens`` (so far), ``memory_gib``, the keys of ``Meter.rates``,
                ``expert_load`` (as :func:`trainer.metrics.expert_load.expert_load` gives it) and ``times`` (seconds
                by part of the step). Values are Python numbers or dictionaries of them.
        """
        if self._is_main:
            self._write(record, "train")
            self._screen.step(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """One evaluation: ``step`` and ``validation_loss``; or a figure of the whole run, such as ``bigram_loss``."""
        if self._is_main:
            self._write(record, "evaluation")
            at = f"step {record['step']}: " if "step" in record else ""
            self._screen.message(at + describe_evaluation(record))

    def message(self, text: str) -> None:
        """A line for the screen only."""
        if self._is_main:
            self._screen.message(text)

    def close(self) -> None:
        """Flush everything and give the terminal back."""
        if self._is_main:
            self._screen.close()
            self._lines.close()
            for chart in self._charts:
                chart.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: dict[str, Any], group: str) -> None:
        self._lines.write(record)
        for chart in self._charts:
            chart.write(record.get("step", 0), flatten(record, group))
