"""How the ranks are laid out, as the config says it."""

from dataclasses import dataclass, field


@dataclass
class ParallelConfig:
    """Sizes of the mesh axes that a user chooses; data parallelism is what is left of the world size."""

    expert: int = field(
        default=1,
        metadata={"help": "expert-parallel ranks: each holds that share of every MoE layer's experts"},
    )
    timeout_minutes: float = field(
        default=10.0,
        metadata={"help": "minutes that a rank waits for the others in one exchange before the job ends"},
    )
