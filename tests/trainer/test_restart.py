"""Which errors mean that another process is gone, and what is said then."""

from pathlib import Path

import pytest
import torch.distributed as dist

from backends.errors import LostPeer
from trainer.checkpoint import folder
from trainer.restart import explain_lost_peer, forget

# As gloo and torch_npu word it; NCCL's has a class of its own.
GLOO = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:38816")
HCCL = RuntimeError("HCCL function error: HcclAllreduce, error code is 9")


def explained(error: RuntimeError, run_dir: Path, step: int | None) -> LostPeer:
    with pytest.raises(LostPeer) as caught:
        explain_lost_peer(error, run_dir, step)
    assert caught.value.__cause__ is error
    return caught.value


@pytest.mark.parametrize("error", [GLOO, HCCL, dist.DistBackendError("watchdog"), dist.DistNetworkError("reset")])
def test_it_says_how_far_the_run_came_and_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    monkeypatch.setenv("RANK", "3")
    for step in (7, 14):
        folder.begin(tmp_path, step)
        folder.publish(tmp_path, step)
    folder.begin(tmp_path, 21)
    assert str(explained(error, tmp_path, 23)) == (
        "rank 3 lost another process during step 24; the newest complete checkpoint is step 14; "
        "start again with --resume"
    )


def test_it_says_so_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert str(explained(GLOO, tmp_path, None)).endswith(
        "before the first step; there is no checkpoint yet; start again with --auto-resume"
    )


def test_one_of_all_ranks_tells_and_after_a_restart_one_again(tmp_path: Path) -> None:
    for _ in range(2):
        assert [explained(GLOO, tmp_path, 3).tell for _ in range(3)] == [True, False, False]
        forget(tmp_path)
    assert [explained(GLOO, tmp_path / "nothing", 3).tell for _ in range(2)] == [True, True]  # rather than none


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    explain_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), tmp_path, 3)
