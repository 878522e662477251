"""placeholder until merged"""

from typing import NamedTuple


class S(NamedTuple):
    torch_name: str
    v_shaped: bool
    chunks: int


SCHEDULES = {
    "gpipe": S("GPipe", False, 1),
    "1f1b": S("1F1B", False, 1),
    "interleaved": S("Interleaved1F1B", False, 2),
    "interleaved-zero-bubble": S("InterleavedZeroBubble", False, 2),
    "zbv": S("ZBVZeroBubble", True, 2),
    "dualpipev": S("DualPipeV", True, 2),
}


def check(schedule: str, pp: int, microbatches: int, chunks: int) -> None:
    pass
