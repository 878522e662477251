"""Faults to plant, one at a time, and what a comparison with a sound trace has to say of each.

Each is a mistake that somebody has made in a trainer. They are put in front of our functions, in the test's own ranks.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import parallel.engine
import trainer.build
import trainer.model.router
import trainer.step
from backends.operations import IGNORED
from backends.weight_gradients import GradientSlot
from parallel.dispatch import AllToAllDispatcher
from parallel.engine import Engine
from parallel.gradients import WholeGradients
from parallel.pipeline.shared import SharedWeight
from trainer.model import MicroBatch, MoETransformer
from trainer.model.context import Meters
from trainer.model.linear import RMSNorm
from trainer.model.router import Router
from trainer.step import Step
from trainer.verify.findings import BACKWARD, DATA, FORWARD, INITIAL, STILL, TRAJECTORY, UPDATE

Plant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
        layout: the name of the case in layouts.py that it is planted in.
        place: what the comparison must name: a module or parameter, as a regular expression.
        likely: what the named class must contain.
    """

    plant: Plant
    layout: str
    phase: str
    place: str
    likely: str


FAULTS: dict[str, Fault] = {}


def fault(layout: str, phase: str, place: str, likely: str) -> Callable[[Plant], Plant]:
    """Register what plants a fault under the name of the function."""

    def register(plant: Plant) -> Plant:
        FAULTS[plant.__name__] = Fault(plant, layout, phase, place, likely)
        return plant

    return register


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def instead(holder: Any, name: str, make: Callable[[Any], Any]) -> Any:
    """Put ``make(original)`` in the place of a function."""
    return mock.patch.object(holder, name, make(getattr(holder, name)))


def in_bf16(value: Tensor) -> Tensor:
    return value.bfloat16().to(value.dtype)


# Data


@fault("dp2", DATA, "sequence 4", "data order")
def order_on_one_rank() -> Any:
    """Rank 1 shuffles its own sequences."""

    def make(cut: Any) -> Any:
        def wrong(self: Step, batch: Any) -> Any:
            if rank() == 1:
                batch = type(batch)(*(getattr(batch, name).flip(0) for name in vars(batch)))
            return cut(self, batch)

        return wrong

    return instead(Step, "cut", make)


@fault("dp2", DATA, "sequence 0", "labels")
def dropped_last_token() -> Any:
    """The last position of a sequence predicts nothing."""

    def make(micro_batches: Any) -> Any:
        def wrong(batch: Any, *more: Any) -> Any:
            labels = batch.labels_BS.clone()
            labels[:, -1] = IGNORED
            return micro_batches(replace(batch, labels_BS=labels), *more)

        return wrong

    return instead(trainer.step, "micro_batches", make)


@fault("pp2", DATA, "sequence 0", "ranks read different data")
def other_labels_on_the_last_stage() -> Any:
    """The second stage of the pipeline has its labels one place further."""

    def make(micro_batches: Any) -> Any:
        def wrong(batch: Any, *more: Any) -> Any:
            labels = batch.labels_BS.roll(-rank(), 1)
            return micro_batches(replace(batch, labels_BS=labels), *more)

        return wrong

    return instead(trainer.step, "micro_batches", make)


# Initial weights


def materialized(change: Callable[[MoETransformer, int], None], seed: Callable[[int], int] = lambda seed: seed) -> Any:
    def make(materialize: Any) -> Any:
        def wrong(model: MoETransformer, given: int, device: Any) -> None:
            materialize(model, seed(given), device)
            with torch.no_grad():
                change(model, given)

        return wrong

    return instead(trainer.build, "materialize", make)


@fault("dp2", INITIAL, r"(embed|layers|norm|mtp|head).*", "ranks start from different weights")
def seed_of_each_rank() -> Any:
    """Weights are drawn from the seed plus the rank."""
    return materialized(lambda model, seed: None, lambda seed: seed + rank())


@fault("one", INITIAL, "embed.weight", "another seed")
def another_seed() -> Any:
    return materialized(lambda model, seed: None, lambda seed: seed + 1)


@fault("ep2", INITIAL, "layers.3.moe.experts.gate_up", "swapped experts")
def swapped_experts() -> Any:
    """Two experts of the last layer stand in each other's place."""

    def change(model: MoETransformer, seed: int) -> None:
        gate_up = model.layers["3"].moe.experts.gate_up
        if rank() == 0:
            gate_up[:2] = gate_up[:2].flip(0)

    return materialized(change)


@fault("one", INITIAL, "layers.1.mlp.down.weight", "initialisation")
def scaled_residual_weights() -> Any:
    """One initial weight is scaled down with the depth, as some trainers do."""

    def change(model: MoETransformer, seed: int) -> None:
        model.layers["1"].mlp.down.weight.div_(8**0.5)

    return materialized(change)


# First forward


@fault("pp2", FORWARD, "layers.2.attention", "attention itself")
def rope_on_the_second_stage() -> Any:
    """The second stage rotates by twice the position. (An offset for all positions would change nothing.)"""

    def make(part: Any) -> Any:
        def wrong(self: MoETransformer, which: Any, hidden: Any, batch: MicroBatch) -> Tensor:
            if not which.first:
                batch = replace(batch, positions_BS=2 * batch.positions_BS)
            return part(self, which, hidden, batch)

        return wrong

    return instead(MoETransformer, "part", make)


@fault("pp2", FORWARD, "layers.2", "precision")
def hidden_states_travel_in_bf16() -> Any:
    def make(part: Any) -> Any:
        def wrong(self: MoETransformer, which: Any, hidden: Any, batch: MicroBatch) -> Tensor:
            return part(self, which, hidden if hidden is None else in_bf16(hidden), batch)

        return wrong

    return instead(MoETransformer, "part", make)


@fault("one", FORWARD, "mtp.0", "multi-token prediction: the tokens")
def multi_token_prediction_embeds_a_token_too_far() -> Any:
    def make(further: Any) -> Any:
        def wrong(self: Any, hidden: Tensor, tokens: Tensor, labels: Tensor, context: Any) -> Tensor:
            return further(self, hidden, tokens.roll(-1, 1), labels, context)

        return wrong

    return instead(MoETransformer, "_further_ahead", make)


@fault("one", FORWARD, "mtp", "labels")
def multi_token_prediction_predicts_the_next_token() -> Any:
    """Its labels are not shifted."""

    def make(further: Any) -> Any:
        def wrong(self: Any, hidden: Tensor, tokens: Tensor, labels: Tensor, context: Any) -> Tensor:
            return further(self, hidden, tokens, labels.roll(1, 1), context)

        return wrong

    return instead(MoETransformer, "_further_ahead", make)


@fault("one", FORWARD, "layers.0.attention_norm", "normalisation")
def norm_epsilon() -> Any:
    def make(forward: Any) -> Any:
        return lambda self, x: self.ops.rms_norm(x, self.weight, 100 * self.eps)

    return instead(RMSNorm, "forward", make)


@fault("one", FORWARD, "layers.2.moe.router", "precision")
def router_in_bf16() -> Any:
    return instead(trainer.model.router, "at_least_fp32", lambda cast: lambda x: in_bf16(cast(x)))


@fault("one", FORWARD, "layers.2.moe.router", "routing flip, not by a tie")
def router_takes_the_second_best() -> Any:
    """The worst chosen expert is replaced by the next for every 16th token."""

    def make(select: Any) -> Any:
        def wrong(self: Router, scores: Tensor) -> Tensor:
            chosen, best = select(self, scores).clone(), scores.topk(3, -1).indices
            chosen[:, ::16] = best[:, ::16, [0, 2]]
            return chosen

        return wrong

    return instead(Router, "_select", make)


@fault("dp2", FORWARD, "layers.2.moe.router", "the loss is scaled")
def aux_loss_times_ranks() -> Any:
    def make(losses: Any) -> Any:
        def wrong(self: Router, *given: Any) -> dict[str, Tensor]:
            found = losses(self, *given)
            return {**found, "aux_loss": found["aux_loss"] * ranks()}

        return wrong

    return instead(Router, "_losses", make)


@fault("ep2", FORWARD, "layers.2.moe", "weights of the combination")
def permuted_combine_weights() -> Any:
    def make(combine: Any) -> Any:
        return lambda self, y, state: combine(self, y, replace(state, weights_TK=state.weights_TK.flip(-1)))

    return instead(AllToAllDispatcher, "combine", make)


@fault("ep2", FORWARD, "layers.2.moe", "dispatch: other rows")
def tokens_to_the_next_expert() -> Any:
    def make(dispatch: Any) -> Any:
        return lambda self, x, experts, weights: dispatch(self, x, (experts + 1) % self.num_experts, weights)

    return instead(AllToAllDispatcher, "dispatch", make)


@fault("dp2", FORWARD, "head", "lm_loss is scaled")
def loss_over_the_labels_of_one_rank() -> Any:
    """The cross entropy is divided by the labels of half the batch."""

    def make(share: Any) -> Any:
        return lambda tokens, sequences: share(tokens=tokens / ranks(), sequences=sequences)

    return instead(trainer.step, "Share", make)


# First backward


@fault("ep2", BACKWARD, r"mtp.0.layer.moe.experts.down\[\d\]", "reduction scaling")
def experts_divided_by_ep_twice() -> Any:
    def make(reduce: Any) -> Any:
        def wrong(self: Engine) -> None:
            reduce(self)
            for index, group in enumerate(self.groups):
                if group.expert:
                    self.zero.averaged_gradients[index].flat_partition.div_(self.topology.ep.size)

        return wrong

    return instead(Engine, "reduce", make)


@fault("dp2", BACKWARD, r"mtp.0.layer.moe.experts.down\[\d\]", "missing reduction over the replicas of experts")
def experts_not_reduced() -> Any:
    def make(reduce: Any) -> Any:
        def wrong(self: WholeGradients) -> list[Tensor]:
            kept = [flat.view(group.replicas.size, -1)[group.replicas.rank].clone() for group, flat in self._flats]
            parts = reduce(self)
            experts = [group.parameters[0].dim() == 3 for group, _ in self._flats]
            return [own if expert else part for own, part, expert in zip(kept, parts, experts, strict=True)]

        return wrong

    return instead(WholeGradients, "reduce", make)


@fault("pp2", BACKWARD, "embed.weight", "missing reduction over the pipeline stages")
def copy_of_the_embedding_forgotten() -> Any:
    """The last stage's gradient of the shared embedding does not reach its owner."""

    def make(collect: Any) -> Any:
        return lambda self, gradient: collect(self, gradient.clone())

    return instead(SharedWeight, "collect", make)


@fault("one", BACKWARD, "head.weight", "precision")
def gradients_added_up_in_bf16() -> Any:
    def make(write: Any) -> Any:
        def wrong(self: GradientSlot, compute: Any) -> None:
            write(self, compute)
            self.view.copy_(in_bf16(self.view))

        return wrong

    return instead(GradientSlot, "write", make)


@fault("one", BACKWARD, "head.weight", "gradient: other values")
def last_micro_batch_without_a_backward() -> Any:
    def make(train: Any) -> Any:
        def wrong(self: Step, batches: list[MicroBatch]) -> None:
            train(self, batches[:-1])
            with torch.no_grad():
                self.pipeline.evaluate(batches[-1:])

        return wrong

    return instead(Step, "train", make)


# First update


@fault("pp2", UPDATE, "gradient norm", "norm of a part")
def clipping_by_stage() -> Any:
    """Each stage of the pipeline clips by the norm of its own gradients."""

    def make(build: Any) -> Any:
        def wrong(*given: Any) -> Any:
            *before, topology, config = given
            return build(*before, replace(topology, pp=replace(topology.pp, size=1)), config)

        return wrong

    return instead(parallel.engine, "_build", make)


@fault("one", UPDATE, "embed.weight", "clipping: one factor")
def clipping_at_another_norm() -> Any:
    return instead(parallel.engine, "_ds_config", lambda made: lambda clip, low: made(clip / 2, low))


@fault("one", UPDATE, "learning rate", "learning-rate schedule")
def warm_up_begins_at_step_2() -> Any:
    def make(learning_rate: Any) -> Any:
        return lambda config, peak, step, steps: learning_rate(config, peak, step + 1, steps)

    return instead(trainer.step, "learning_rate", make)


@fault("one", UPDATE, "embed.weight", "weight decay")
def no_weight_decay() -> Any:
    return instead(trainer.build, "parameter_groups", lambda made: lambda model, decay: made(model, 0.0))


@fault("one", UPDATE, "embed.weight", "second moment")
def another_beta2() -> Any:
    return instead(
        trainer.build, "adamw", lambda made: lambda config, **more: made(replace(config, beta2=0.999), **more)
    )


@fault("dp2", UPDATE, r"(embed|layers|norm|mtp|head).*", "stale or different weights")
def stale_weights_on_one_rank() -> Any:
    """Rank 1 does not get the other's part after the step."""

    def make(gather: Any) -> Any:
        def wrong(flat: Tensor, group: Any) -> None:
            before = flat.clone()
            gather(flat, group)
            if rank() == 1:
                half = flat.numel() // 2
                flat[:half] = before[:half]

        return wrong

    return instead(parallel.engine, "gather_parts", make)


@fault("one", UPDATE, "layers.2.moe.router.expert_bias", "expert bias: moved")
@contextmanager
def bias_moves_every_micro_batch() -> Iterator[None]:
    counted: dict[str, list[Tensor]] = {}

    def make_count(count: Any) -> Any:
        def watched(self: Meters, layer: str, tokens: Tensor) -> None:
            counted.setdefault(layer, []).append(tokens)
            count(self, layer, tokens)

        return watched

    def make_gather(gather: Any) -> Any:
        def wrong(self: Step, wants_stop: Any) -> Any:
            for name, moe in self.model.moe_layers():
                for tokens in counted[name][:-1]:  # the step itself moves it once more
                    moe.router.balance(tokens)
            counted.clear()
            return gather(self, wants_stop)

        return wrong

    with instead(Meters, "count", make_count), instead(Step, "_gather", make_gather):
        yield


@fault("dp2", UPDATE, "layers.2.moe.router.expert_bias", "ranks have different expert biases")
@contextmanager
def bias_moves_by_local_counts() -> Iterator[None]:
    local: dict[str, Tensor] = {}

    def make_take(take: Any) -> Any:
        def watched(self: Meters) -> Any:
            sums, counts = take(self)
            local.update({name: tokens.clone() for name, tokens in counts.items()})
            return sums, counts

        return watched

    def make_gather(gather: Any) -> Any:
        def wrong(self: Step, wants_stop: Any) -> Any:
            losses, _, stop = gather(self, wants_stop)
            return losses, dict(local), stop

        return wrong

    with instead(Meters, "take", make_take), instead(Step, "_gather", make_gather):
        yield


# Later steps


@fault("one", STILL, "head.weight", "gradient: ")
def gradients_are_not_cleared() -> Any:
    """The second step adds to the gradients of the first."""

    def make(close: Any) -> Any:
        def wrong(self: GradientSlot) -> None:
            close(self)
            self.filled = True

        return wrong

    return instead(GradientSlot, "close", make)


@fault("one", TRAJECTORY, "embed.weight", "change of the weights")
def bias_correction_of_the_first_step() -> Any:
    """The optimizer's count of steps begins anew every time."""

    def make(step: Any) -> Any:
        def wrong(self: Engine, lr: float) -> float:
            for master in self.zero.single_partition_of_fp32_groups:
                self.zero.optimizer.state[master]["step"].zero_()
            return step(self, lr)

        return wrong

    return instead(Engine, "step", make)
