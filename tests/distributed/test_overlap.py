"""DualPipeV with its pairs run at once, against torch's way of running them; overlap_cases.py says on what."""

from typing import Any

import pytest

from tests.distributed.overlap_cases import MICRO_BATCHES, STEPS
from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, "tests.distributed.overlap_cases")


@pytest.mark.parametrize("what", ["gradients", "losses"])
def test_pairs_run_at_once_change_no_bit(ranks: list[dict[str, Any]], what: str) -> None:
    # The same arithmetic in the same order, so equal to the bit.
    for rank in ranks:
        assert rank["overlapped"][what] == rank["plain"][what]
    assert any(rank["plain"][what] for rank in ranks)
    assert len(ranks[0]["plain"]["losses"]) == (STEPS + 1) * MICRO_BATCHES  # an evaluation comes last


def test_forward_and_backward_of_every_pair_meet(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["overlapped"]["met"] == STEPS * rank["overlapped"]["pairs"] > 0
        assert rank["plain"]["met"] == 0
