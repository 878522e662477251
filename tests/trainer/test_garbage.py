"""Garbage collection stays out of steps on an accelerator."""

import gc
import weakref

import pytest
import torch

from trainer.garbage import collected_between_steps


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def test_rings_live_until_the_step_has_ended() -> None:
    with collected_between_steps(torch.device("meta")) as collect:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        left = weakref.ref(Ring())
        assert left() is not None
        collect()
        assert left() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_an_exception_brings_the_collector_back() -> None:
    with pytest.raises(KeyError), collected_between_steps(torch.device("meta")):
        raise KeyError
    assert gc.isenabled()


def test_the_cpu_is_left_alone() -> None:
    with collected_between_steps(torch.device("cpu")) as collect:
        assert gc.isenabled() and collect() is None
