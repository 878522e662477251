"""Checkpoints of several ranks: who writes what, what each holds in memory, and who hears of a failure."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks

SLACK = 48 << 20  # for Python, the files' buffers and the allocator; a tenth of the large model's state


@pytest.fixture(scope="module")
def ranks(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, "tests.distributed.checkpoint_cases", str(small), str(tmp_path_factory.mktemp("cases")))


def test_what_one_rank_cannot_write_all_hear_of(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["one_disk_is_full"] for rank in ranks)
    assert first == second
    message, none, newest = first
    assert "rank 1 could not write the checkpoint of step 1 (File too large); mend that" in message
    assert (none, newest) == ("None", "step-000003")


def test_a_failure_of_one_rank_is_the_same_line_on_all(ranks: list[dict[str, Any]]) -> None:
    assert [rank["failure_of_one"] for rank in ranks] == ["rank 1: a nonsense"] * 2


def test_a_silent_process_is_given_up(ranks: list[dict[str, Any]]) -> None:
    assert [rank["silent_peer"] for rank in ranks] == ["lost", "came late"]


@pytest.mark.slow
def test_no_rank_holds_the_state_of_another(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")  # freed memory goes back, so that what is resident is in use
    for rank in run_ranks(2, "tests.distributed.checkpoint_cases", str(small), str(tmp_path), "large"):
        for asynchronous in (True, False):
            found = rank[f"large-{asynchronous}"]
            shard, largest = found["shard"], found["largest"]
            assert shard > 200 << 20 and largest < shard / 4  # or the bounds say nothing
            assert found["saving"] < shard + SLACK  # a copy of what this rank owns
            assert found["saving_again"] < (largest if asynchronous else shard) + SLACK  # staged where the first was
            # A piece at a time, whoever wrote it.
            assert found["loading"] < 2 * largest + SLACK
            assert found["loading_elsewhere"] < 2 * largest + SLACK
            # The writing thread, and no second pool of OpenMP threads.
            assert found["threads"] <= 1
