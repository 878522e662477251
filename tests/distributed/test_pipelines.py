"""Every pipeline schedule trains the model that one process trains, alone and with expert and data parallelism."""

from pathlib import Path

import pytest

from tests.distributed.matrix import BOUND, STEPS, Case, compare, every_case, train

SHORT = 8  # steps here; the slow matrix has 20
UNEVEN = "parallel.layers_per_stage=[5,3]"  # the first stage has no experts
CASES = [
    Case("gpipe", pp=2),
    Case("1f1b", pp=2, recompute=True, more=UNEVEN),
    Case("interleaved", pp=2),
    Case("interleaved-zero-bubble", pp=2, recompute=True),
    Case("zbv", pp=2),
    Case("dualpipev", pp=2, recompute=True),
    Case("1f1b", pp=2, edp=2),
    Case("dualpipev", pp=2, ep=2),
    Case("interleaved-zero-bubble", pp=2, ep=2),
    Case("zbv", pp=4),
]
TIED = "model.tie_embeddings=true"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    train(folder, [Case(), *CASES, Case(more=TIED), Case("1f1b", pp=2, more=TIED)], SHORT)
    return folder


# The mission's bound; every sum of a layout has another order than one process, and AdamW's division by sqrt(v)
# magnifies that for elements whose gradient is near 0. Measured: docs/parallelism.md.
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_schedule_trains_the_same_model(runs: Path, case: Case) -> None:
    found = compare(runs, [case], SHORT, Case())[case]
    assert found.within(BOUND), found


def test_tied_embeddings_are_one_weight_on_two_stages(runs: Path) -> None:
    case = Case("1f1b", pp=2, more=TIED)
    found = compare(runs, [case], SHORT, Case(more=TIED))[case]
    assert found.within(BOUND), found


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_whole_matrix(tmp_path: Path) -> None:
    """Without recomputation on half of the cases and with it on the others; `tests.distributed.matrix` runs all."""
    cases = [case for number, case in enumerate(every_case(8)) if case.recompute == bool(number % 2)]
    train(tmp_path, [Case(), *cases], STEPS)
    wrong = {case.name: found for case, found in compare(tmp_path, cases, STEPS, Case()).items()}
    assert not {name: found for name, found in wrong.items() if not found.within(BOUND)}
