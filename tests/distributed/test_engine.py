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
    assert [rank["expert_replicas"] for rank in ranks] == [[[1.0, 1.0]] * 2, [[2.0, 2.0]] * 2]


def test_zero_2_sums_what_zero_1_sums(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        whole, part = rank["both_stages"]["zero 1"], rank["both_stages"]["zero 2"]
        assert part["steps"] == whole["steps"]
        assert part["held"] * 2 == whole["held"]
    first, second = ranks[0]["both_stages"]["zero 2"]["steps"]
    assert len({*first, *second}) > 10  # the values tell places apart


def test_zero_2_refuses_gradients_that_come_too_late(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        again, unended = rank["gradients_too_late"]
        assert again.startswith("a gradient for a bucket that has gone")
        assert unended == "end_micro_batch comes first"


def test_zero_2_holds_its_part_and_a_few_buckets(ranks: list[dict[str, Any]]) -> None:
    """48 MiB of gradients on two ranks, buckets of 4 MiB: one fills, one is on its way. Here: 35 MiB."""
    for rank in ranks:
        assert rank["memory"]["zero 1"] > 46
        # gloo has buffers of its own for a bucket that it sums.
        assert 22 < rank["memory"]["zero 2"] < 24 + 4 * 4


def test_the_norm_counts_every_parameter_once_and_clips_by_it(ranks: list[dict[str, Any]]) -> None:
    # fp32: the clip factor is 1 / (3 + 1e-6).
    assert ranks[0]["global_norm"] == pytest.approx([3.0, 2 / 3, 2 / 3], rel=1e-6)
    assert ranks[1]["global_norm"] == pytest.approx([3.0, 2 / 3, 1 / 3], rel=1e-6)
