"""Contenders by name; each is imported only in the process that runs it."""

from typing import Any

from benchmarks.contender import Contender

OURS = ("moebius", "moebius-plain")
PEERS = ("transformers", "deepspeed", "autoep", "torchtitan")


def make(job: dict[str, Any]) -> Contender:
    """Build the job's contender.

    Raises:
        Unavailable: it cannot run here.
    """
    name = job["contender"]
    if name in OURS:
        from benchmarks import contenders

        contender = getattr(contenders, name.replace("-", "_"))(job)
    elif name == "torchtitan":
        from benchmarks import titan

        contender = titan.torchtitan(job)
    else:
        from benchmarks import peers

        contender = getattr(peers, name)(job)
    assert contender.parameters == job["parameters"], f"{name}: {contender.parameters:,} parameters"
    return contender
