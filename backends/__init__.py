"""Which device am I on, what can it do, and its fused operations. Imports torch and the standard library only.

``select`` gives the :class:`~backends.base.Backend` of a run; ``describe_all`` is what ``moebius info`` prints.
"""

from typing import TYPE_CHECKING

from backends import environment
from backends.errors import UserError
from backends.lazy import exports

environment.prepare()  # before torch's first allocation

if TYPE_CHECKING:
    from backends.base import Backend, MemoryStats
    from backends.operations import ExpertOrder, Operations
    from backends.selection import describe_all, select

__all__ = ["Backend", "ExpertOrder", "MemoryStats", "Operations", "UserError", "describe_all", "select"]

__getattr__ = exports(  # what needs torch, which takes seconds to import
    __name__,
    {
        "Backend": "base",
        "MemoryStats": "base",
        "ExpertOrder": "operations",
        "Operations": "operations",
        "describe_all": "selection",
        "select": "selection",
    },
)
