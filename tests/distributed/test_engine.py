"""The traps of running DeepSpeed with our experts and gradients; engine_cases.py says what each case does."""

from typing import Any

import pytest

from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, "tests.distributed.engine_cases")


def test_bf16_gradients_are_accumulated_and_reduced_in_fp32(ranks: list[dict[str, Any]]) -> None:
    exact = 2.0 + 3 * 2.0**-9  # bf16 has 8 bits: it would round this to 2
    assert ranks[0]["bf16_reduction"] + ranks[1]["bf16_reduction"] == [exact] * 4


def test_gradients_set_without_hooks_are_not_lost(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["gradient_without_hooks"] + ranks[1]["gradient_without_hooks"] == [6.0, 6.0, 10.0, 10.0]


def test_multiplies_and_hooks_meet_in_one_buffer(ranks: list[dict[str, Any]]) -> None:
    # Four passes (two micro-batches, two ranks): the multiply gives each weight 1, the lookup gives row 1 another 2.
    expected = [4.0, 4.0, 12.0, 12.0, 4.0, 4.0, 4.0, 4.0]
    assert ranks[0]["deferred_and_tied"] + ranks[1]["deferred_and_tied"] == expected


def test_an_unused_parameter_has_gradient_zero(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["unused_parameter"] + ranks[1]["unused_parameter"] == [0.0] * 4


def test_experts_are_summed_over_their_own_replicas_only(ranks: list[dict[str, Any]]) -> None:
    assert [rank["expert_replicas"] for rank in ranks] == [[1.0, 1.0], [2.0, 2.0]]


def test_the_norm_counts_every_parameter_once_and_clips_by_it(ranks: list[dict[str, Any]]) -> None:
    # fp32: the clip factor is 1 / (3 + 1e-6).
    assert ranks[0]["global_norm"] == pytest.approx([3.0, 2 / 3, 2 / 3], rel=1e-6)
    assert ranks[1]["global_norm"] == pytest.approx([3.0, 2 / 3, 1 / 3], rel=1e-6)


@pytest.mark.parametrize("what", ["output", "x", "weights", "experts"])
def test_dispatch_over_ranks_equals_local_dispatch(ranks: list[dict[str, Any]], what: str) -> None:
    # fp64, values of about 10: a matrix multiply of other rows may sum in another order.
    assert all(rank["dispatch"][what] <= 1e-13 for rank in ranks)
