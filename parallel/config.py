"""How the ranks are laid out, as the config says it."""

from dataclasses import dataclass

from backends.key import key
from parallel.pipeline.order import SCHEDULES, default_chunks


@dataclass
class ParallelConfig:
    """Sizes of the mesh axes that a user chooses; data parallelism is what is left of the world size."""

    pipeline: int = key(1, "pipeline-parallel ranks: each holds some of the layers")
    expert: int = key(1, "expert-parallel ranks: each holds that share of every MoE layer's experts")
    dispatcher: str = key(
        "all-to-all",
        "what brings tokens to the ranks of their experts, where there are several: torch's all-to-all, or on NVIDIA "
        "GPUs the kernels of deepep",
        choices=("all-to-all", "deepep"),
    )
    schedule: str = key(
        "1f1b",
        "order of the micro-batches in the pipeline: gpipe, 1f1b, interleaved, interleaved-zero-bubble, zbv, dualpipev",
        choices=("gpipe", "1f1b", "interleaved", "interleaved-zero-bubble", "zbv", "dualpipev"),
    )
    stages_per_rank: int = key(
        0, "pipeline stages on each rank; 0: what the schedule needs (1 for gpipe and 1f1b, 2 for the others)"
    )
    zero: int = key(
        1,
        "data-parallel ranks divide the optimizer's state (1), or the gradients as well (2), which are then summed in "
        "every micro-batch; 2 goes without a pipeline",
    )
    layers_per_stage: list[int] = key(list, "layers of each pipeline stage; empty: balanced by estimated cost")
    timeout_minutes: float = key(10.0, "minutes that a rank waits for the others in one exchange before the job ends")

    @property
    def overlaps(self) -> bool:
        """Whether a rank runs a forward and a backward at once."""
        return self.pipeline > 1 and SCHEDULES[self.schedule].overlaps

    @property
    def stages(self) -> int:
        """Pipeline stages on all ranks."""
        return self.pipeline * (self.stages_per_rank or default_chunks(self.schedule))
