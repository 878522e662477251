"""The training loop: the same for one process and for thousands.

A step reads this rank's share of the global batch, adds up gradients over micro-batches, sums them over ranks, and
updates. Every loss is a sum divided by a count over the *global* batch, so ranks and micro-batches simply add up.
"""

import math

import torch
from torch import Tensor

from backends.errors import UserError
from backends.operations import IGNORED
from parallel.pipeline import trace
from parallel.pipeline.timeline import Span, covered
from parallel.topology import sum_over
from trainer import checkpoint
from trainer.config.load import dump_config
from trainer.data import bigram_loss
from trainer.evaluation import evaluate, micro_batches
from trainer.interrupt import StopRequest
from trainer.metrics.expert_load import expert_load
from trainer.metrics.meter import Meter
from trainer.metrics.recorder import Recorder
from trainer.model import Share
from trainer.model.count import flops_per_token
from trainer.optimizer import learning_rate
from trainer.setup import Run

_REFUSALS = 5  # steps in a row without a finite gradient before the run gives up


class Loop:
    """Trains a prepared :class:`Run` to its last step."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.sequences = self.config.train.global_batch_tokens // self.config.data.sequence_length
        dp = run.topology.dp
        share = self.sequences // dp.size
        self.mine = range(dp.rank * share, (dp.rank + 1) * share)
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
        ):
            stopped = False
            while run.step < train.steps and not stopped:
                stopped = self._step()
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
            batch = run.training.read(self.sequences, self.mine)
            tokens = sum_over(run.topology.dp, (batch.labels_BS != IGNORED).sum().to(run.backend.device))
            share = Share(tokens=float(tokens), sequences=float(self.sequences))
            micros = micro_batches(batch, share, config, run.backend.device)
        run.pipeline.train(micros, run.engine.end_micro_batch)
        with clock.span("reduce"):
            run.engine.reduce()
        lr = learning_rate(config.schedule, config.optimizer.lr, run.step + 1, config.train.steps)
        with clock.span("optimizer"):
            norm = run.engine.step(lr)
        losses, counts, stop = self._gather()
        self._refuse_nonsense(norm)
        if math.isfinite(norm):
            for name, moe in run.model.moe_layers():
                moe.router.balance(counts[name])

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
                    **losses,
                    "grad_norm": norm,
                    "lr": lr,
                    "tokens": run.tokens,
                    **self.meter.rates(config.train.steps - run.step),
                    "memory_gib": run.backend.memory().peak / 2**30,
                    "times": times,
                    "expert_load": expert_load(counts),
                }
            )
        return stop

    def _trace(self, actions: list[Span]) -> None:
        """Of the first pipeline, if this is the step to trace."""
        run, layout = self.run, self.config.parallel
        if run.step == self.config.metrics.trace_step and run.topology.dp.rank == 0:
            pp, chunks = layout.pipeline, layout.stages // layout.pipeline
            header = trace.Header(layout.schedule, pp, run.pipeline.micro_batches, chunks, run.step)
            trace.write(run.run_dir, header, run.topology.pp.rank, actions)

    def _gather(self) -> tuple[dict[str, float], dict[str, Tensor], bool]:
        """Losses and tokens per expert of the global batch, and whether any rank wants to stop: two reductions.

        A pipeline stage has some of the losses and layers: the others are zeros there, so that all ranks agree.
        """
        run, device = self.run, self.run.backend.device
        sums, counts = run.model.meters.take()
        names = self.config.model.loss_names()
        zero = torch.zeros((), device=device)
        values = torch.stack([*(sums.get(name, zero) for name in names), zero + float(self.stop.wanted)])
        *found, wants = sum_over(run.topology.world, values).tolist()
        losses = dict(zip(names, found, strict=True))
        weights = {"mtp_loss": self.config.model.mtp_loss}
        total = {"loss": sum(weights.get(name, 1.0) * value for name, value in losses.items())}
        layers = self.config.model.moe_names()
        if layers:
            idle = torch.zeros(self.config.model.moe.num_experts, dtype=torch.int64, device=device)
            together = torch.stack([counts.get(name, idle) for name in layers])
            counts = dict(zip(layers, sum_over(run.topology.world, together), strict=True))
        return {**total, **losses}, counts, wants > 0

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
