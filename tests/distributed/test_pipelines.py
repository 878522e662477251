"""Every pipeline schedule trains the model that one process trains, alone and with expert and data parallelism."""

from pathlib import Path
from statistics import mean

import pytest

from parallel.pipeline import trace
from parallel.pipeline.order import SCHEDULES
from tests.distributed.matrix import BOUND, Case, compare, train
from tests.distributed.ranks import run_ranks
from tests.small import write_inputs
from trainer.verify.difference import records

SHORT = 6  # steps here
UNEVEN = "parallel.layers_per_stage=[5,3]"  # the first stage has no experts
CASES = [
    Case("gpipe", pp=2),
    Case("1f1b", pp=2, recompute=True, more=UNEVEN),
    Case("interleaved", pp=2),
    Case("interleaved-zero-bubble", pp=2, recompute=True),
    Case("zbv", pp=2),
    Case("dualpipev", pp=2, recompute=True),
    Case("dualpipev", pp=2, ep=2),
    Case("zbv", pp=4),
]
TIED = "model.tie_embeddings=true"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    train(folder, [Case(), *CASES, Case(more=TIED), Case("1f1b", pp=2, more=TIED)], SHORT)
    return folder


# The mission's bound; every sum of a layout has another order than one process, and AdamW's division by sqrt(v)
# magnifies that for elements whose gradient is near 0. Measured: docs/pipeline.md.
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.folder)
def test_a_schedule_trains_the_same_model(runs: Path, case: Case) -> None:
    found = compare(runs, [case], SHORT, Case())[case]
    assert found.within(BOUND), found


def test_tied_embeddings_are_one_weight_on_two_stages(runs: Path) -> None:
    case = Case("1f1b", pp=2, more=TIED)
    found = compare(runs, [case], SHORT, Case(more=TIED))[case]
    assert found.within(BOUND), found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("cases")
    write_inputs(folder)
    return folder, run_ranks(2, "tests.distributed.pipeline_cases", f"{folder}/small.yaml", str(folder))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved-zero-bubble"])
def test_every_layer_runs_twice_under_recomputation(ranks: tuple[Path, list[dict]], schedule: str) -> None:
    """Forward and once again: shapes are not tried out with a real forward, a split backward walks the graph once."""
    for rank in ranks[1]:
        assert rank[schedule]["calls"] == rank[schedule]["expected"]


def test_a_step_is_traced(ranks: tuple[Path, list[dict]]) -> None:
    header, timeline = trace.read(ranks[0] / "zbv")
    assert header == trace.Header("zbv", pp=2, micro_batches=8, chunks=2, step=2)
    assert {span.kind for spans in timeline.ranks for span in spans} == {"F", "I", "W"}  # all of ZBV's is split
    assert 0 < timeline.bubble < 1


def test_shared_memory_collectives_are_not_compiled_at_start(ranks: tuple[Path, list[dict]]) -> None:
    assert not any(rank["shm_comm"] for rank in ranks[1])


@pytest.mark.slow
def test_bf16_stays_within_its_noise(tmp_path: Path) -> None:
    """A sum in another order changes some activations by a bf16 rounding, and training then drifts."""
    bf16 = "train.precision=bf16"
    plain, otherwise = Case(more=bf16), Case(more=f"{bf16} train.micro_batch_size=4")
    cases = [Case("zbv", pp=2, more=bf16), Case("1f1b", pp=2, more=bf16)]
    train(tmp_path, [plain, otherwise, *cases], SHORT)

    def apart(case: Case) -> list[float]:
        pairs = zip(records(tmp_path / plain.folder), records(tmp_path / case.folder), strict=True)
        return [abs(one["loss"] - other["loss"]) / one["loss"] for one, other in pairs if "loss" in one]

    floor = mean(apart(otherwise))
    for case in cases:
        found = apart(case)
        assert found[0] < 1e-6  # nothing has been rounded differently yet
        # The mean of six draws of a noise: three times another one's is a rare accident.
        assert mean(found) < 3 * floor, (case.folder, found, floor)


# Of the whole matrix, which takes an hour: every schedule on eight ranks, in turn over the layouts.
LONG = [
    Case(schedule, *layout, recompute=bool(number % 2))
    for number, (schedule, layout) in enumerate(
        zip(SCHEDULES, [(4, 2, 1), (2, 2, 2), (4, 1, 2), (2, 4, 1), (2, 2, 2), (4, 2, 1)], strict=True)
    )
]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_long_matrix(tmp_path: Path) -> None:
    """Ten steps on eight ranks; docs/pipeline.md has twenty of every layout."""
    train(tmp_path, [Case(), *LONG], 10)
    found = compare(tmp_path, LONG, 10, Case())
    assert not {case.folder: apart for case, apart in found.items() if not apart.within(BOUND)}
