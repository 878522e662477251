"""When another process of the job is gone: how that looks from here."""

import torch.distributed as dist

_TRANSPORTS = ("gloo", "nccl", "hccl")


def is_lost_peer(error: BaseException) -> bool:
    """Whether this is what the others of a job meet when one of its processes dies, hangs or leaves.

    torch has classes for what NCCL and its own store raise. gloo and HCCL raise a bare RuntimeError that names them.
    A pipeline stage wraps what its forward or backward met, so causes count.
    """
    if isinstance(error, dist.DistError) or (error.__cause__ is not None and is_lost_peer(error.__cause__)):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error).lower() for name in _TRANSPORTS)
