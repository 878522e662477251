"""What must hold of one value by itself, and that in words."""

import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from backends.errors import UserError


class Rule(NamedTuple):
    """``holds`` tells whether a value may be; ``remedy`` says so in words."""

    holds: Callable[[Any], bool]
    remedy: str


COUNT = Rule(lambda value: value >= 1, "it must be at least 1")
NATURAL = Rule(lambda value: value >= 0, "it must be 0 or more")
POSITIVE = Rule(lambda value: value > 0, "it must be above 0")
FINITE = Rule(math.isfinite, "it must be a finite number")


def check_ranges(config: Any, rules: Mapping[str, Rule], where: str, prefix: str = "") -> None:
    """Raise :class:`UserError` for the first value that breaks its rule, or is infinite or no number.

    Args:
        config: a config dataclass.
        rules: key, from ``config`` on (``moe.top_k``), to its rule.
        where: the config file, for messages.
        prefix: what comes before the keys in messages, as in ``model.``.
    """
    for key, rule in rules.items():
        value = attrgetter(key)(config)
        if isinstance(value, float) and not math.isfinite(value):
            rule = FINITE
        if not rule.holds(value):
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UserError(f"{where}: {prefix}{key}: is {shown}; {rule.remedy}")
