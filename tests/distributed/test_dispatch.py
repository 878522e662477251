"""Experts on other ranks give what experts here give; dispatch_cases.py says what each case does."""

from typing import Any

import pytest

from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, "tests.distributed.dispatch_cases")


@pytest.mark.parametrize("what", ["output", "x", "weights", "experts"])
@pytest.mark.parametrize(
    "case, bound",
    [
        ("all-to-all", 1e-14),  # fp64: a matrix multiply of other rows may sum in another order
        ("deepep fp32", 1e-6),  # and here a token's results are summed by rank first
        ("deepep bf16", 1e-2),  # each rank's sum is rounded to bf16 (2⁻⁸), before and after it is weighed and added
    ],
)
def test_dispatch_over_ranks_equals_local_dispatch(
    ranks: list[dict[str, Any]], case: str, bound: float, what: str
) -> None:
    assert all(rank[case][what] <= bound for rank in ranks)


def test_a_model_is_the_same_under_either_dispatcher(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        plain, deepep = rank["models"]["all-to-all"], rank["models"]["deepep"]
        assert (plain["dispatchers"], deepep["dispatchers"]) == (["AllToAllDispatcher"], ["DeepEPDispatcher"])
        assert deepep["loss"] == pytest.approx(plain["loss"], rel=1e-3)  # bf16, where a choice of experts may flip
        assert deepep["gradients"] == pytest.approx(plain["gradients"], rel=0.05)
