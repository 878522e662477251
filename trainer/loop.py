"""The training loop: the same for one process and for thousands.

A step reads this rank's share of the global batch, adds up gradients over micro-batches, sums them over ranks, and
updates (trainer/step.py).
"""

import math

from backends.errors import UserError
from parallel.pipeline import trace
from parallel.pipeline.timeline import Span, covered
from trainer import checkpoint
from trainer.config.load import dump_config
from trainer.data import bigram_loss
from trainer.evaluation import evaluate
from trainer.garbage import collected_between_steps
from trainer.interrupt import StopRequest
from trainer.metrics.expert_load import expert_load
from trainer.metrics.meter import Meter
from trainer.metrics.recorder import Recorder
from trainer.model.count import flops_per_token
from trainer.setup import Run
from trainer.step import Step

_REFUSALS = 5  # steps in a row without a finite gradient before the run gives up


class Loop:
    """Trains a prepared :class:`Run` to its last step."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.step = Step(self.config, run.topology, run.backend.device, run.model, run.engine, run.pipeline)
        self.sequences = self.step.sequences
        self.refusals = 0
        self.saved_at = run.step
        dtype = next(run.model.parameters()).dtype
        peak = self.config.metrics.peak_tflops * 1e12 or run.backend.peak_flops(dtype)
        flops = flops_per_token(self.config.model, self.config.data.sequence_length)
        self.meter = Meter(flops, peak, run.topology.world_size)

    def train(self) -> bool:
        """Run to the last step, or to the end of the step in which a signal arrives; save either way.

        Returns:
            whether the last step was reached.
        """
        run, train = self.run, self.config.train
        run.model.train()
        if run.topology.is_main:
            try:
                run.run_dir.mkdir(parents=True, exist_ok=True)
                (run.run_dir / "config.yaml").write_text(dump_config(self.config))
            except OSError as error:
                raise UserError(
                    f"run_dir: {run.run_dir}: cannot be written ({error.strerror}); choose another"
                ) from error
        with (
            Recorder(str(run.run_dir), self.config, run.topology.is_main, train.steps, run.step) as self.recorder,
            checkpoint.Saver(run.run_dir, run.model, run.engine, self.config, run.tokenizer) as self.saver,
            StopRequest().listening() as self.stop,
            collected_between_steps(run.backend.device) as collect,
        ):
            stopped = False
            while run.step < train.steps and not stopped:
                stopped = self._step()
                collect()
                last = run.step == train.steps or stopped
                if not stopped and (last or (train.eval_every and run.step % train.eval_every == 0)):
                    with self.meter.pause():
                        self.recorder.evaluation({"step": run.step, "validation_loss": self.evaluate()})
                every = self.config.checkpoint.every
                if last or (every and run.step % every == 0):
                    with self.meter.pause():
                        self._save()
            self.saver.wait()
            if stopped:
                self.recorder.message(f"stopped after step {run.step}, saved; go on with --resume")
            elif train.bigram_baseline:
                self.recorder.evaluation({"step": run.step, "bigram_loss": self._bigram()})
        return not stopped

    def _step(self) -> bool:
        """One optimizer step; returns whether some rank wants to stop."""
        run, config, clock = self.run, self.config, self.run.pipeline.clock
        clock.take()
        with clock.span("data"):
            batch = run.training.read(self.sequences, self.step.mine)
        found = self.step.run(batch, run.step + 1, lambda: self.stop.wanted)
        self._refuse_nonsense(found.norm)

        run.step += 1
        trained = self.sequences * config.data.sequence_length
        run.tokens += trained
        self.meter.step(trained)
        times, actions = clock.take()
        if actions:
            times["pipeline_wait"] = times["forward_backward"] - covered(actions)
            self._trace(actions)
        if run.step % config.train.log_every == 0 or run.step == config.train.steps:
            self.recorder.step(
                {
                    "step": run.step,
                    **found.losses,
                    "grad_norm": found.norm,
                    "lr": found.lr,
                    "tokens": run.tokens,
                    **self.meter.rates(config.train.steps - run.step),
                    "memory_gib": run.backend.memory().peak / 2**30,
                    "times": times,
                    "expert_load": expert_load(found.counts),
                }
            )
        return found.stop

    def _trace(self, actions: list[Span]) -> None:
        """Of the first pipeline, if this is the step to trace."""
        run, layout = self.run, self.config.parallel
        if run.step == self.config.metrics.trace_step and run.topology.dp.rank == 0:
            pp, chunks = layout.pipeline, layout.stages // layout.pipeline
            header = trace.Header(layout.schedule, pp, run.pipeline.micro_batches, chunks, run.step)
            trace.write(run.run_dir, header, run.topology.pp.rank, actions)

    def _refuse_nonsense(self, norm: float) -> None:
        self.refusals = 0 if math.isfinite(norm) else self.refusals + 1
        if self.refusals == _REFUSALS:
            raise UserError(
                f"{self.run.where}: optimizer.lr: the gradient norm was not finite in {_REFUSALS} steps in a row "
                f"(step {self.run.step + 1}); lower it, or resume from the checkpoint of step {self.saved_at}"
            )

    def evaluate(self) -> float:
        """Mean loss per token on the held-out sequences (``train.eval_sequences`` of them), over all ranks."""
        run = self.run
        return evaluate(run.model, run.pipeline, run.topology, run.backend, run.validation, self.config).loss

    def _bigram(self) -> float:
        """Validation loss of a smoothed bigram model fitted on the tokens that this run trained on."""
        self.run.validation.restart()
        seen = self.run.training.tokens(0, self.config.train.steps * self.sequences)
        count = self.config.train.eval_sequences or self.run.validation.num_sequences or self.sequences
        held_out = self.run.validation.read(count, range(count))
        return bigram_loss(seen, held_out, self.run.tokenizer.vocab_size)

    def _save(self) -> None:
        run = self.run
        if self.saved_at == run.step:
            return
        state = {"tokens": run.tokens, "data": run.training.state_dict()}
        self.saver.save(run.step, state)
        self.saved_at = run.step
