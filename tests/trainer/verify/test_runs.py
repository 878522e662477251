"""Two metrics files: what is within the published bounds, what is beyond each of them, and what is no metrics file."""

import json
import math
import random

import numpy as np
import pytest

from backends.errors import UserError
from trainer.metrics.jsonl import FILE_NAME
from trainer.verify.report import Report
from trainer.verify.runs import Bounds, compare
from trainer.verify.series import drift, outliers

STEPS = 200


def records(**changed) -> list[dict]:
    """A run's records; ``changed`` maps a figure to a function of step and value."""
    draw = random.Random(0)
    made = []
    for step in range(1, STEPS + 1):
        loss = 2 + 6 * math.exp(-step / 30) + draw.gauss(0, 0.05)
        record = {"step": step, "loss": loss, "grad_norm": 1 + abs(draw.gauss(0, 0.3))}
        for name, change in changed.items():
            record[name] = change(step, record[name])
        made.append(record)
    return made


def write(tmp_path, name: str, made: list[dict]) -> str:
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / FILE_NAME).write_text("".join(json.dumps(record) + "\n" for record in made))
    return str(tmp_path / name)


@pytest.fixture
def against(tmp_path):
    """Compares the run above with the records that it is given."""

    def run(made: list[dict], **more) -> Report:
        return compare(write(tmp_path, "a", records()), write(tmp_path, "b", made), **more)

    return run


def checks(report: Report) -> dict[tuple[str, str], str]:
    """The mark of every check."""
    table = report.sections[-1]
    return {row[:2]: mark for row, mark in zip(table.rows, table.marks, strict=True)}


def failed(report: Report) -> list[tuple[str, str]]:
    found = [check for check, mark in checks(report).items() if mark == "different"]
    assert bool(found) == (report.verdict == "different")
    return found


SPIKES, DRIFT = ("loss", "spikes of the difference"), ("loss", "drift of the difference over the run")
FIRST, MEAN = ("loss", "first loss (step 1)"), ("loss", "mean difference")
NORM = ("grad_norm", "mean relative difference")


def test_a_run_is_the_same_as_itself(against):
    report = against(records())
    assert failed(report) == [] and {FIRST, MEAN, SPIKES, DRIFT, NORM} <= checks(report).keys()
    assert report.summary == "all 8 checks hold over 200 steps."
    assert ("loss", "first unequal value", "none", "") in report.sections[-1].rows


def noise(share: float, seed: int = 1):
    draw = random.Random(seed)
    return lambda step, value: value * (1 + draw.gauss(0, share))


def test_noise_within_the_bounds_is_the_same(against):
    assert failed(against(records(loss=noise(0.003), grad_norm=noise(0.05)))) == []


# Just inside and just outside of each bound. The losses are above 1: the relative bound is the wider one.
@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"loss": lambda step, x: x * (1.0049 if step == 1 else 1)}, []),
        ({"loss": lambda step, x: x * (1.0051 if step == 1 else 1)}, [FIRST]),
        ({"loss": lambda step, x: x * (1 if step == 1 else 1 + 0.0099 * (-1) ** step)}, []),
        ({"loss": lambda step, x: x * (1 if step == 1 else 1 + 0.0103 * (-1) ** step)}, [MEAN]),
        ({"grad_norm": lambda step, x: x * 1.099}, []),
        ({"grad_norm": lambda step, x: x * 0.899}, [NORM]),
        ({"loss": lambda step, x: x + (0.5 if step == 100 else 0)}, [SPIKES]),
        ({"loss": lambda step, x: x + (0.005 if step == 100 else 0)}, []),
    ],
)
def test_each_bound(against, changed, expected):
    assert failed(against(records(**changed))) == expected


def test_the_absolute_bound_is_enough_for_a_small_loss(against, tmp_path):
    small = [record | {"loss": 0.01} for record in records()]
    one = write(tmp_path, "one", small)
    assert failed(compare(one, write(tmp_path, "two", [record | {"loss": 0.0149} for record in small]))) == []
    other = compare(one, write(tmp_path, "two", [record | {"loss": 0.0151} for record in small]))
    assert failed(other) == [FIRST]


def test_a_drift_that_the_mean_hides_is_found(against):
    """From -1.5 % to 1.5 %, whose mean is 0.75 %."""
    jitter = noise(0.002)
    found = against(records(loss=lambda step, x: jitter(step, x) + 2.2 * 0.03 * ((step - 1) / (STEPS - 1) - 0.5)))
    assert DRIFT in failed(found) and MEAN not in failed(found)


def test_noise_is_no_drift_and_no_spike():
    """Of 200 curves. A slope of 5 standard errors is rarer than 1 in 10,000 at 18 degrees of freedom."""
    draw = np.random.default_rng(0)
    steps = np.arange(200.0)
    found = [(drift(steps, values)[1], outliers(values).any()) for values in draw.normal(size=(200, 200))]
    assert not any(trend for trend, _ in found) and not any(spike for _, spike in found)


def test_the_drift_of_a_line_is_its_rise():
    steps = np.arange(10.0, 60.0)
    moved, certain = drift(steps, 3 - 0.02 * steps)
    assert certain and moved == pytest.approx(-0.02 * 49, rel=1e-12)


def test_spikes_do_not_hide_each_other():
    values = np.random.default_rng(0).normal(size=200)
    spikes = [0, 50, 51, 120, 160, 199]  # so many that they would hide in a variance: 8 times 17
    values[spikes] += 100
    assert np.flatnonzero(outliers(values)).tolist() == spikes


def test_missing_steps_are_a_difference_unless_only_common_ones_are_asked_for(against):
    fewer = [record for record in records() if record["step"] not in (7, 8)]
    report = against(fewer)
    assert failed(report) == [("steps", "recorded")] and "B lacks 2 steps, first 7" in report.summary
    assert failed(against(fewer, common=True)) == []
    assert "B lacks 100 steps, first 101" in against(records()[:100]).summary


def test_of_a_step_that_was_recorded_again_the_last_record_counts(against, tmp_path):
    wrong = [record | {"loss": 9.0} for record in records()[50:80]]
    report = against(records()[:80][:50] + wrong + records()[50:])
    assert failed(report) == [] and report.about["B"].endswith("(200 steps, 30 recorded again after a resume)")


def test_a_loss_that_is_no_number_in_one_run_is_a_difference(against):
    report = against(records(loss=lambda step, x: None if step == 5 else x))
    assert failed(report) == [("loss", "a finite number")] and "step 5" in report.summary


def test_a_loss_that_one_run_does_not_have_is_a_difference(against):
    report = against([record | {"aux_loss": 0.1} for record in records()])
    assert failed(report) == [("aux_loss", "a finite number")]


def test_losses_that_are_numbers_in_neither_run_are_no_difference(tmp_path):
    made = records(loss=lambda step, x: None)
    assert compare(write(tmp_path, "a", made), write(tmp_path, "b", made)).verdict == "same"


def test_the_first_unequal_value_is_named_however_small(against):
    report = against(records(loss=lambda step, x: x * (1 + (1e-14 if step >= 33 else 0))))
    (row,) = [row for row in report.sections[-1].rows if row[:2] == ("loss", "first unequal value")]
    assert row[2].startswith("step 33, by 1.") and report.verdict == "same"


def test_bounds_are_the_caller_s_and_are_stated(against):
    report = against(records(grad_norm=lambda step, x: x * 1.05), bounds=Bounds(norm_relative=0.04))
    assert failed(report) == [NORM] and "gradient norm 0.04" in report.about["bounds"]


def test_two_steps_are_too_few_for_spikes_and_drift(tmp_path):
    two = records()[:2]
    report = compare(write(tmp_path, "a", two), write(tmp_path, "b", two))
    assert checks(report)[SPIKES] == checks(report)[DRIFT] == "" and report.verdict == "same"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "holds no training steps"),
        ("5\nnonsense\n", "holds no training steps"),
        ('{"step": 1, "loss": "two"}\n', "step 1: has figures that are no numbers"),
        ('{"step": 9000, "loss": 2.0}\n', "has no step that"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, problem):
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(UserError, match=problem) as raised:
        compare(write(tmp_path, "a", records()), str(tmp_path / "b.jsonl"))
    assert str(raised.value).startswith(f"{tmp_path}/b.jsonl: ") and "\n" not in str(raised.value)


def test_a_missing_file_and_one_that_is_no_text_are_one_line(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no: there is no such file; give the directory"):
        compare(str(tmp_path / "no"), str(tmp_path / "no"))
    with pytest.raises(UserError, match="binary: cannot be read"):
        compare(str(tmp_path / "binary"), str(tmp_path / "binary"))
