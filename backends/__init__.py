"""Which device am I on, what can it do, and its fused operations. Imports torch and the standard library only.

``select`` gives the :class:`~backends.base.Backend` of a run; ``describe_all`` is what ``moebius info`` prints.
"""

from backends import environment

environment.prepare()  # before torch's first allocation, hence before the imports below

from backends.base import Backend, MemoryStats  # noqa: E402
from backends.errors import UserError  # noqa: E402
from backends.operations import ExpertOrder, Operations  # noqa: E402
from backends.selection import describe_all, select  # noqa: E402

__all__ = ["Backend", "ExpertOrder", "MemoryStats", "Operations", "UserError", "describe_all", "select"]
