"""Faults are planted one at a time; a comparison with a sound trace must name phase, place and class of each."""

import re
from pathlib import Path

import pytest

from tests.small import write_inputs
from tests.verify.faults import FAULTS
from tests.verify.layouts import LAYOUTS, record_all
from trainer.verify.compare import compare

CASES = {case.name: case for case in LAYOUTS}
SOUND = CASES["one"]._replace(overrides=f"{CASES['one'].overrides} --noise")
# One of most phases, on one layout of two ranks, for the tests that run always.
FEW = (
    "order_on_one_rank",
    "seed_of_each_rank",
    "aux_loss_times_ranks",
    "experts_not_reduced",
    "stale_weights_on_one_rank",
)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sound trace of one process."""
    folder = tmp_path_factory.mktemp("faults")
    write_inputs(folder)
    record_all(folder / "small.yaml", folder, [SOUND])
    return folder


def judge(traces: Path, names: list[str]) -> None:
    """Record each fault, and see what is said of it."""
    cases = [CASES[FAULTS[name].layout]._replace(name=name, fault=name) for name in names]
    record_all(traces / "small.yaml", traces, cases)
    wrong = {}
    for name in names:
        fault, found = FAULTS[name], compare(traces / "one", traces / name).first
        named = found is not None and (
            found.phase == fault.phase and re.fullmatch(fault.place, found.place) and fault.likely in found.likely
        )
        if not named:
            wrong[name] = str(found)
    assert not wrong


def test_a_fault_of_most_phases_is_named(traces: Path) -> None:
    judge(traces, list(FEW))


def test_the_same_layouts_without_a_fault_are_the_same(traces: Path) -> None:
    """Or the test above could pass for another reason."""
    record_all(traces / "small.yaml", traces, [CASES["dp2"], CASES["ep2"]])
    for name in ("dp2", "ep2"):
        found = compare(traces / "one", traces / name)
        assert found.same, found.first
        assert all(phase.measured and not phase.loose for phase in found.phases), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_fault_is_named(traces: Path) -> None:
    assert len(FAULTS) >= 24
    judge(traces, [name for name in FAULTS if name not in FEW])
