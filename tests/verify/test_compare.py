"""What a comparison makes of the golden trace after one thing in it was changed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from backends.errors import UserError
from tests.distributed.ranks import ROOT
from trainer.verify.compare import compare
from trainer.verify.findings import BACKWARD, DATA, FORWARD, PHASES, TRAJECTORY, UPDATE, Comparison
from trainer.verify.readings import Disagreement, Key
from trainer.verify.sums import COUNT, SQUARE, SUM
from trainer.verify.trace import Trace, load, save

GOLDEN = ROOT / "tests" / "verify" / "golden"
ROUTER = "layers.1.moe.router"


@pytest.fixture
def against(tmp_path: Path) -> Callable[..., Comparison]:
    """Compares the golden trace, less its noise floor, with what a function makes of it."""

    def compared(change: Callable[[Trace], object], both: Callable[[Trace], object] = lambda _: None) -> Comparison:
        for name, steps in (("one", [both]), ("other", [both, change])):
            trace = load(GOLDEN)
            trace.floor.clear()
            trace.header.margin_floor = None
            for step in steps:
                step(trace)
            save(trace, tmp_path / name)
        return compare(tmp_path / "one", tmp_path / "other")

    return compared


def scale(key: Key, factor: float) -> Callable[[Trace], object]:
    """Every element of a tensor times that."""

    def change(trace: Trace) -> None:
        row = trace.rows[key]
        count, square = row[COUNT], row[SQUARE]
        row *= factor
        row[COUNT], row[SQUARE] = count, square * factor**2

    return change


def test_a_trace_is_the_same_as_itself(against: Callable[..., Comparison]) -> None:
    found = against(lambda trace: None)
    assert found.same and [phase.name for phase in found.phases] == list(PHASES)
    assert all(phase.measured for phase in found.phases)


def test_keys_that_both_have_are_told_where_they_differ(against) -> None:
    def change(trace: Trace) -> None:
        trace.header.config["seed"] = 4
        del trace.header.config["optimizer.lr"]  # as if a later version had brought it

    assert against(change).differing.keys() == {"seed"}


@pytest.mark.parametrize("factor, same", [(1 + 5e-6, True), (1 + 2e-5, False)])
def test_a_reading_may_move_within_its_tolerance(against, factor: float, same: bool) -> None:
    found = against(scale(Key("train", 1, "forward", "layers.1.attention"), factor))
    assert found.same == same
    if not same:
        assert (found.first.phase, found.first.place) == (FORWARD, "layers.1.attention")


def test_a_noise_floor_widens_the_tolerance_of_its_reading(against) -> None:
    key = Key("train", 1, "gradient", "layers.1.attention.kv_up.weight")

    def floor(trace: Trace) -> None:
        trace.floor[key] = 1e-4

    assert against(scale(key, 1 + 5e-4)).first.place == key.name
    assert against(scale(key, 1 + 5e-4), floor).same
    assert against(scale(key, 1 + 2e-3), floor).first.phase == BACKWARD


def test_no_floor_goes_beyond_the_published_thresholds(against) -> None:
    keys = [Key("train", step, "total", "loss") for step in (1, 2)]

    def floor(trace: Trace) -> None:
        trace.floor.update(dict.fromkeys(keys, 0.1))

    def change(factor: float) -> Callable[[Trace], object]:
        return lambda trace: [trace.rows[key].__imul__(factor) for key in keys]

    assert against(change(1.004), floor).same
    assert against(change(1.006), floor).first.place == "loss"


def flipped(margin: float) -> Callable[[Trace], object]:
    """One token of the first step chooses another expert, by that margin; and the layers behind it differ."""

    def change(trace: Trace) -> None:
        key = Key("train", 1, "experts", ROUTER)
        chosen, lead = trace.arrays[key], trace.arrays[key._replace(kind="margin")]
        chosen[5] = sorted({0, 1, 2, 3} - set(chosen[5]))
        lead[5] = margin
        trace.rows[Key("train", 1, "forward", "norm")] *= 1.001

    return change


def test_a_choice_by_a_tie_is_no_difference(against) -> None:
    found = against(flipped(1e-7))
    assert found.same
    assert {phase.name: phase.ties for phase in found.phases if phase.ties} == {FORWARD: 1}
    assert all(phase.loose for phase in found.phases if phase.name in (FORWARD, BACKWARD, UPDATE, TRAJECTORY))


def test_after_a_tie_losses_are_held_to_the_published_thresholds(against) -> None:
    def change(trace: Trace) -> None:
        flipped(1e-7)(trace)
        trace.rows[Key("train", 1, "total", "loss")] *= 1.006

    assert against(change).first.place in ("loss", "first loss")


def test_a_choice_by_more_is_a_difference(against) -> None:
    found = against(flipped(0.05)).first
    assert (found.phase, found.place, found.likely) == (FORWARD, ROUTER, "routing flip, not by a tie")


def test_ranks_that_disagree_are_told_of_either_trace(against) -> None:
    def disagree(trace: Trace) -> None:
        trace.header.disagreements.append(Disagreement(Key("train", 2, "data", "3"), [1, 3]))

    forth = against(disagree)
    for found in (forth, compare(Path(forth.other), Path(forth.one))):
        assert (found.first.phase, found.first.place) == (DATA, "sequence 3")
        assert "rank 1, 3" in found.first.evidence


def test_a_difference_of_later_steps_is_of_the_trajectory(against) -> None:
    found = against(scale(Key("train", 2, "total", "lm_loss"), 1.001)).first
    assert (found.phase, found.step, found.place) == (TRAJECTORY, 2, "head")


def test_what_is_not_finite_is_named(against) -> None:
    def change(trace: Trace) -> None:
        trace.rows[Key("train", 1, "forward", "layers.0.mlp")][SUM] = np.nan

    found = against(change).first
    assert (found.phase, found.place, found.likely) == (FORWARD, "layers.0.mlp", "not finite")


def test_traces_of_other_models_are_refused(against) -> None:
    with pytest.raises(UserError, match="another model.*: mtp.0.norm.weight has"):
        against(lambda trace: trace.rows.pop(Key("train", 0, "weight", "mtp.0.norm.weight")))


def test_a_loss_that_only_one_has_is_named(against) -> None:
    found = against(lambda trace: trace.rows.pop(Key("train", 1, "total", "z_loss"))).first
    assert (found.phase, found.place, found.likely) == (FORWARD, "z_loss", "missing")


def test_the_golden_trace_has_a_noise_floor() -> None:
    """Another micro-batch size gives other last bits everywhere, and no more than the built-in tolerances allow."""
    golden = load(GOLDEN)
    floors = [value for key, value in golden.floor.items() if key.kind in ("forward", "gradient") and key.step == 1]
    assert len(floors) > 100 and 0 < np.median(floors) < 1e-6 and max(floors) < 1e-5
    assert 0 < golden.header.margin_floor < 2e-6
