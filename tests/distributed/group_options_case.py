"""Lays the mesh of four ranks, on torch's fake group, with a backend that has options for some axes.

Reports which group was made with which.
"""

import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed import device_mesh, distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from backends.cpu import CpuBackend
from parallel import topology
from parallel.config import ParallelConfig
from tests.distributed.ranks import report


class Choosy(CpuBackend):
    """Remembers for which axis it made which options."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, str] = {}
        self.kept: list[object] = []

    def group_options(self, axis: str) -> FakeProcessGroup.Options | None:
        if axis == "edp":
            return None
        options = FakeProcessGroup.Options()
        self.made[id(options)] = axis
        self.kept.append(options)
        return options


def main() -> None:
    backend = Choosy()
    created: dict[str, str | None] = {}
    plain = distributed_c10d.new_group

    def new_group(*args, **kwargs):
        group = plain(*args, **kwargs)
        if isinstance(group, dist.ProcessGroup):
            created[group.group_name] = backend.made.get(id(kwargs.get("pg_options")))
        return group

    device_mesh.new_group = distributed_c10d.new_group = new_group
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    place = topology.start(backend, ParallelConfig(pipeline=2, expert=2, schedule="dualpipev"))
    axes = ("pp", "ep", "ep_backward", "dp", "edp")
    report({axis: created[getattr(place, axis).group.group_name] for axis in axes})


if __name__ == "__main__":
    main()
