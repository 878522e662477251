"""The DeepSpeed adapter: everything DeepSpeed has to be told lives here, and nothing of it elsewhere.

DeepSpeed gives ZeRO-1: parameters of a group lie in one flat buffer, each data-parallel rank owns an equal part of
it with fp32 master weights and AdamW moments, clips, steps its part, and all parts are gathered again. Experts are
a group of their own whose replicas are the ``edp`` ranks.

Gradients do not take DeepSpeed's own path. They are added up in flat fp32 buffers that mirror the parameters, and
summed over ranks straight into the part that the optimizer reads: once a step (ZeRO-1, parallel/gradients.py) or once a
micro-batch (ZeRO-2, parallel/buckets.py, which keeps only that part). Matrix multiplies write their weight gradients
there themselves, at once or later (backends/weight_gradients.py); all others are folded in by a hook. That path has no
bf16 rounding, does not depend on which hooks ran, and costs no pass over most gradients where DeepSpeed's bucket,
partition, norm and flatten copies cost about eight (docs/benchmarks.md has the numbers).

Convention: every loss is divided by the size of the *global* batch before backward, so gradients are summed over
ranks and micro-batches, never averaged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from backends.base import Backend
from backends.weight_gradients import GradientSlot
from parallel.buckets import PartGradients
from parallel.collectives import gather_parts
from parallel.gradients import FlatGroup, WholeGradients
from parallel.pipeline.shared import SharedWeight
from parallel.topology import Axis, Topology

EXPERTS = "experts"  # DeepSpeed's name for our one expert-parallel group


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay and a set of replicas."""

    names: list[str]
    parameters: list[nn.Parameter]
    weight_decay: float
    expert: bool


@dataclass(frozen=True)
class Shard:
    """The part of one parameter whose master weight and moments this rank owns, all flat and fp32.

    ``offset`` and ``size`` count elements of the *whole* parameter, flattened: an expert's offset includes the
    experts that other ranks hold.
    """

    name: str
    offset: int
    size: int
    whole: int  # elements of the whole parameter
    state: dict[str, Tensor]  # views of (size,); of :meth:`Engine.shards` "weight", "exp_avg", "exp_avg_sq"


class _Partition(list):
    """What DeepSpeed's step looks for: a gradient group that already owns its flat partition."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


def _deepspeed() -> Any:
    """Import DeepSpeed without its start-up builds and banners."""
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists, even without a launcher
    import deepspeed
    from deepspeed.runtime.zero import stage_1_and_2
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # its start-up notes and warnings are about choices that this file makes

    # Its shared-memory collectives would be compiled at start (36 to 80 s); gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    stage_1_and_2.all_gather_dp_groups = _gather
    return deepspeed


def _gather(groups_flat: list[Tensor], dp_process_group: list[dist.ProcessGroup], **_: Any) -> None:
    """DeepSpeed's gathering of the weights, by our collective and without a limit on its size."""
    for flat, group in zip(groups_flat, dp_process_group, strict=True):
        gather_parts(flat, group)


class Engine:
    """Owns the optimizer side of training: gradients, their reduction, clipping, the ZeRO step.

    Args:
        module: the model (or this rank's part of it), weights in place.
        groups: its parameters; every rank of a pipeline stage gives the same groups in the same order.
        make_optimizer: builds the torch optimizer from parameter-group dicts; a fused one, because DeepSpeed's
            own unfused AdamW takes longer than the rest of its step.
        clip_norm: largest global gradient norm; 0 never clips.
        shared: a weight of another pipeline stage too; where it is a copy it is in none of the groups.
        zero_stage: 1, or 2 to keep only this rank's part of the gradients; then without a pipeline, and with
            :meth:`end_micro_batch` after every backward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[ParameterGroup],
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        topology: Topology,
        backend: Backend,
        clip_norm: float = 0.0,
        shared: SharedWeight | None = None,
        zero_stage: int = 1,
    ) -> None:
        self.topology, self.groups = topology, [group for group in groups if group.parameters]
        low_precision = next(module.parameters()).dtype == torch.bfloat16
        deepspeed = _deepspeed()
        deepspeed.init_distributed(backend.distributed_backend, verbose=False, dist_init_required=False)
        self._deepspeed = _build(
            deepspeed, module, self.groups, make_optimizer, topology, _ds_config(clip_norm, low_precision)
        )
        self.zero = self._deepspeed.optimizer
        flat = [
            FlatGroup(group.parameters, offsets, buffer.numel(), self._replicas(group))
            for group, offsets, buffer in zip(
                self.groups, self.zero.round_robin_bit16_offsets, self.zero.bit16_groups_flat, strict=True
            )
        ]
        self._gradients: WholeGradients | PartGradients
        if zero_stage == 2:
            assert topology.pp.size == 1, "validate_layout of the config comes first"
            self._gradients = PartGradients(flat, {p: number for number, p in enumerate(module.parameters())})
        else:
            self._gradients = WholeGradients(flat)
        self._slots = dict(self._gradients.slots)
        self.shared = shared
        if shared is not None and not shared.owned:
            self._slots[shared.weight] = GradientSlot(torch.zeros_like(shared.weight, dtype=torch.float32))
        for parameter, slot in self._slots.items():
            parameter.gradient_slot = slot  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(self._fold)

    def _fold(self, parameter: nn.Parameter) -> None:
        """Move a fresh ``.grad`` into its slot, if there is one: multiplies put theirs there themselves."""
        if parameter.grad is not None:
            self._slots[parameter].add(parameter.grad)
            parameter.grad = None

    def flush(self) -> None:
        """Fold gradients that were set without autograd's hooks."""
        for parameter in self._slots:
            self._fold(parameter)

    @torch.no_grad()
    def end_micro_batch(self) -> None:
        """After the backward pass of a micro-batch, on all ranks; ZeRO-1 can do without."""
        self.flush()
        self._gradients.end_micro_batch()

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients of all micro-batches over the replicas, into the part that this rank steps."""
        self.flush()
        for slot in self._slots.values():
            slot.close()
        if self.shared is not None:
            self.shared.collect(self._slots[self.shared.weight].view)
        for index, part in enumerate(self._gradients.reduce()):
            self.zero.averaged_gradients[index] = _Partition(part)

    def step(self, lr: float) -> float:
        """Clip and update with learning rate ``lr``. After :meth:`reduce`.

        Returns:
            the global gradient norm before clipping; not finite when the step was refused for that reason.
        """
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        if self.shared is not None:
            self.shared.refresh()
        return float(self.zero.norm)

    def gradients(self) -> Iterator[Tensor]:
        """Where gradients are added up: views of the buffers that hold them, and under ZeRO-2 of this rank's part."""
        yield from self._gradients.buffers()
        yield from (slot.view for slot in self._slots.values())

    def _replicas(self, group: ParameterGroup) -> Axis:
        return self.topology.edp if group.expert else self.topology.dp

    def shards(self) -> Iterator[Shard]:
        """The master weights and moments that this rank owns, by full parameter name."""

        def state(index: int) -> dict[str, Tensor]:
            master = self.zero.single_partition_of_fp32_groups[index]
            moments = self.zero.optimizer.state[master]
            return {"weight": master.detach(), "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}

        return self._owned(state)

    def reduced(self) -> Iterator[Shard]:
        """The summed gradients that this rank steps, by full parameter name. Between :meth:`reduce` and :meth:`step`.

        Their ``state`` has "gradient" alone.
        """
        return self._owned(lambda index: {"gradient": self.zero.averaged_gradients[index].flat_partition})

    def contributions(self) -> Iterator[Shard]:
        """What this rank adds to the gradients, by full parameter name. Before :meth:`reduce`.

        Their ``state`` has "gradient" alone. Under ZeRO-2 there are none: gradients are summed as they come.
        """
        if isinstance(self._gradients, PartGradients):
            return
        self.flush()
        experts = {name for group in self.groups if group.expert for name in group.names}
        for name, parameter in self._deepspeed.module.named_parameters():
            if self._slots[parameter].filled:
                before, whole = self._place(parameter, name in experts)
                gradient = self._slots[parameter].view.view(-1)
                yield Shard(name, before, parameter.numel(), whole, {"gradient": gradient})

    def _place(self, parameter: nn.Parameter, expert: bool) -> tuple[int, int]:
        """Elements of the whole parameter that stand before those held here, and all of them."""
        axis = self.topology.ep
        size = parameter.numel()
        return (axis.rank * size, axis.size * size) if expert else (0, size)

    def _owned(self, tensors: Callable[[int], dict[str, Tensor]]) -> Iterator[Shard]:
        """The part of every parameter that this rank steps. ``tensors`` gives this rank's flat ones of a group."""
        for index, group in enumerate(self.groups):
            flat = tensors(index)
            size = self.zero.single_partition_of_fp32_groups[index].numel()
            start = self._replicas(group).rank * size
            for name, parameter, offset in zip(
                group.names, group.parameters, self.zero.round_robin_bit16_offsets[index], strict=True
            ):
                first, last = max(offset, start), min(offset + parameter.numel(), start + size)
                if first >= last:
                    continue
                before, whole = self._place(parameter, group.expert)
                yield Shard(
                    name=name,
                    offset=before + first - offset,
                    size=last - first,
                    whole=whole,
                    state={kind: values[first - start : last - start] for kind, values in flat.items()},
                )

    @property
    def steps(self) -> int:
        """Updates so far: the AdamW step count, the same for every parameter."""
        master = self.zero.single_partition_of_fp32_groups[0]
        return int(self.zero.optimizer.state[master]["step"])

    def loaded(self, steps: int) -> None:
        """After :meth:`shards` were overwritten: refresh the model's weights and set the step count."""
        for master in self.zero.single_partition_of_fp32_groups:
            self.zero.optimizer.state[master]["step"].fill_(steps)
        self.zero.update_lp_params()
        if self.shared is not None:
            self.shared.refresh()


def _ds_config(clip_norm: float, low_precision: bool) -> dict[str, Any]:
    return {
        # DeepSpeed wants batch sizes; ours are the trainer's business and never reach it.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": low_precision},
        "zero_optimization": {"stage": 1},
        "communication_data_type": "fp32",  # gathers move parameters in their own dtype whatever this says
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def _build(
    deepspeed: Any,
    module: nn.Module,
    groups: list[ParameterGroup],
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    topology: Topology,
    config: dict[str, Any],
) -> Any:
    """DeepSpeed's engine with our process groups and gradient path in place of what it would assume."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer

    class FlatZero(DeepSpeedZeroOptimizer):
        """ZeRO-1 fed from flat fp32 gradient partitions."""

        norm: Tensor

        def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
            """One reduction for all groups: partitions are disjoint over dp (experts too) and stages over pp.

            DeepSpeed does one per group, which hangs when a pipeline stage has another number of groups.
            """
            squares = [_square_sum(grads.flat_partition) for grads in self.averaged_gradients.values()]
            total = torch.stack(squares).sum()
            for axis in (topology.dp, topology.pp):
                if axis.size > 1:
                    dist.all_reduce(total, group=axis.group)
            self.norm = total.sqrt().float()
            if not torch.isfinite(self.norm):
                self.overflow = True  # the step is skipped, in every precision
            return self.norm

        def _lazy_init_hp_params_optimizer_state(self) -> None:
            """Its fragment links go stale here; Engine.shards is the way to the state."""

    class FlatEngine(DeepSpeedEngine):
        """DeepSpeedEngine that knows our experts although they are not its own MoE layer."""

        def _configure_distributed_model(self, model: nn.Module) -> None:
            super()._configure_distributed_model(model)
            self.seq_data_parallel_group = topology.dp.group
            self.has_moe_layers = any(group.expert for group in groups)
            self.expert_parallel_group = {EXPERTS: topology.ep.group}
            self.expert_data_parallel_group = {EXPERTS: topology.edp.group}

        def _broadcast_model(self) -> None:
            """Weights are drawn by name: equal on every replica already."""

        def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
            from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

            return ZERO_OPTIMIZATION  # bf16 included: its BF16_Optimizer is another code path

        def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
            zero = FlatZero(
                optimizer,
                self.param_names,
                timers=NoopTimer(),
                optimizer_params={},
                verbose=False,
                contiguous_gradients=False,  # none of its gradient buffers and hooks
                partition_grads=False,
                clip_grad=self.gradient_clipping(),
                dp_process_group=topology.dp.group,
                expert_parallel_group=self.expert_parallel_group if self.has_moe_layers else None,
                expert_data_parallel_group=self.expert_data_parallel_group if self.has_moe_layers else None,
                has_moe_layers=self.has_moe_layers,
                gradient_accumulation_dtype=next(self.module.parameters()).dtype,
                communication_data_type=torch.float32,
                check_grad_overflow=False,  # the norm says it already
            )
            _settle(zero)
            return zero

    for group in groups:
        for parameter in group.parameters:
            if group.expert:
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = EXPERTS  # type: ignore[attr-defined]
    optimizer = make_optimizer(
        [
            {"params": group.parameters, "weight_decay": group.weight_decay, "moe": group.expert, "name": EXPERTS}
            for group in groups
        ]
    )
    engine = FlatEngine(
        args=None,
        model=module,
        optimizer=optimizer,
        model_parameters=[p for group in groups for p in group.parameters],
        config=config,
        config_class=DeepSpeedConfig(config),
        dont_change_device=True,
    )
    # Its forward hooks serve engine.backward, which nobody calls.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    engine.set_gradient_accumulation_boundary(True)
    return engine


def _square_sum(flat: Tensor) -> Tensor:
    """Sum of squares in fp64 at the price of one fp32 pass: norms of short rows, squared and added in fp64.

    torch's CPU norm of a long fp32 vector adds sequentially: 1 % off at 100 million elements, where this is 2e-10.
    """
    width = 1024
    whole = flat.numel() // width * width
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, width), dim=1)
    return rows.double().square().sum() + flat[whole:].double().square().sum()


def _settle(zero: Any) -> None:
    """Make state that DeepSpeed leaves lazy, and drop copies that fp32 does not need."""
    for index, master in enumerate(zero.single_partition_of_fp32_groups):
        rank = dist.get_rank(group=zero.real_dp_process_group[index])
        own = zero.parallel_partitioned_bit16_groups[index][rank]
        if own.dtype == master.dtype:
            master.data = own.data  # fp32: the parameters are their own master weights
        for parameter in zero.bit16_groups[index]:
            parameter._hp_mapping = None  # would keep the replaced copy alive
        zero.optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
