"""Every data- and expert-parallel layout trains the model that one process trains, and checkpoints move between."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.small import write_inputs
from trainer.verify.difference import difference, records, tensors

# fp32, summed in another order by every layout: a few ulps a step, which AdamW's division by sqrt(v) magnifies for
# elements whose gradient is near 0. The mission's bound; the runs below measure about 1e-6.
BOUND = 1e-5
STEPS = 20

# name, ranks, overrides
ONE_MICRO_BATCH = "train.micro_batch_size=4"  # on two ranks
# What families other than DeepSeek's add to the model: gpt-oss, and the normalised head of Ling.
OTHERS = (
    "model.num_layers=5 "
    "model.attention.kind=gqa model.attention.num_heads=4 model.attention.num_kv_heads=2 model.attention.head_dim=8 "
    "model.attention.bias=true model.attention.output_bias=true model.attention.sinks=true model.attention.window=8 "
    "model.attention.full_every=2 model.moe.score=softmax model.moe.router_bias=true model.moe.linear_bias=true "
    "model.moe.swiglu_limit=1.0 model.normalize_head=true"
)
LAYOUTS = [
    ("one", 1, ""),
    ("one-recompute", 1, "train.activation_checkpointing=layer"),
    ("one-micro-8", 1, "train.micro_batch_size=8"),
    ("dp2", 2, ""),
    ("ep2", 2, "parallel.expert=2"),
    ("ep2-recompute", 2, "parallel.expert=2 train.activation_checkpointing=layer"),
    ("edp2-ep2", 4, "parallel.expert=2"),
    ("dp2-zero2", 2, "parallel.zero=2"),
    ("edp2-ep2-zero2-recompute", 4, "parallel.zero=2 parallel.expert=2 train.activation_checkpointing=layer"),
    ("others", 1, OTHERS),
    ("others-ep2-recompute", 2, f"{OTHERS} parallel.expert=2 train.activation_checkpointing=layer"),
    ("dp2-whole", 2, f"{ONE_MICRO_BATCH} train.steps=5"),
    ("dp2-zero2-whole", 2, f"{ONE_MICRO_BATCH} train.steps=5 parallel.zero=2"),
]
# More ranks than most machines have cores: slow, and the same code.
LARGE = [
    ("dp4", 4, ""),
    ("ep4", 4, "parallel.expert=4"),
    (
        "others-pp2-ep2",
        4,
        f"{OTHERS} parallel.pipeline=2 parallel.schedule=zbv parallel.expert=2 train.activation_checkpointing=layer",
    ),
    ("others-edp2-ep2-zero2", 4, f"{OTHERS} parallel.zero=2 parallel.expert=2"),
    ("edp4-ep2", 8, "parallel.expert=2 train.micro_batch_size=1"),
    ("edp2-ep4-recompute", 8, "parallel.expert=4 train.activation_checkpointing=layer"),
    ("ep8", 8, "parallel.expert=8"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of every layout; one launch for each number of ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    write_inputs(folder)
    for ranks in (1, 2, 4):
        train_all(folder, ranks, LAYOUTS)
    return folder


def train_all(folder: Path, ranks: int, layouts: list[tuple[str, int, str]]) -> None:
    """Train every layout of that many ranks, in one launch."""
    lines = [f"{overrides} run_dir={folder}/{name}" for name, n, overrides in layouts if n == ranks]
    for outcome in run_ranks(ranks, "tests.distributed.train_many", f"{folder}/small.yaml", *lines, timeout=600):
        assert outcome == ["done"] * len(lines)


COMPARED = [name for name, *_ in LAYOUTS if name not in ("one", "others") and not name.endswith("whole")]


@pytest.mark.parametrize("name", COMPARED)
def test_a_layout_trains_the_same_model(runs: Path, name: str) -> None:
    assert_same_model(runs, name)


def test_zero_2_with_one_micro_batch_is_bitwise_zero_1(runs: Path) -> None:
    """Each sum has two terms, in one order or the other: the same number."""
    whole, part = tensors(runs / "dp2-whole"), tensors(runs / "dp2-zero2-whole")
    assert all(torch.equal(value, part[key]) for key, value in whole.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_more_ranks_train_the_same_model(runs: Path) -> None:
    for ranks in (4, 8):
        train_all(runs, ranks, LARGE)
    for name, *_ in LARGE:
        assert_same_model(runs, name)


def assert_same_model(runs: Path, name: str) -> None:
    one = "others" if name.startswith("others") else "one"
    found = difference(runs / one, runs / name, STEPS)
    assert found.within(BOUND), found


def test_clipping_was_active(runs: Path) -> None:
    assert max(record.get("grad_norm", 0) for record in records(runs / "one")) > 0.5


@pytest.mark.slow
def test_a_run_resumes_under_any_layout(runs: Path, tmp_path: Path) -> None:
    """Step 14 of a 4-rank run, continued by one, two and four ranks: the uninterrupted run's figures."""
    config = runs / "small.yaml"
    ways = [("a", 1, ""), ("b", 2, "parallel.expert=2"), ("c", 4, ""), ("d", 4, "parallel.expert=2")]
    for name, _, _ in ways:
        shutil.copytree(runs / "edp2-ep2", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-000020")
    for ranks in (1, 2, 4):
        lines = [f"--resume {overrides} run_dir={tmp_path}/{name}" for name, n, overrides in ways if n == ranks]
        assert set(run_ranks(ranks, "tests.distributed.train_many", str(config), *lines)[0]) == {"done"}
    for name, _, _ in ways:
        for one, other in zip(records(runs / "edp2-ep2"), records(tmp_path / name), strict=True):
            if "loss" in one:
                # Bitwise on the layout that saved; elsewhere sums have another order.
                bound = 0 if name == "d" else BOUND
                assert other["loss"] == pytest.approx(one["loss"], rel=bound, abs=0), (name, one["step"])
    same, there = tensors(tmp_path / "d"), tensors(runs / "edp2-ep2")
    assert all(torch.equal(same[key], there[key]) for key in there)


def test_a_checkpoint_read_under_another_layout_is_bitwise_the_same(runs: Path, tmp_path: Path) -> None:
    """No training in between: loaded on two ranks and saved again, every tensor is what four ranks saved."""
    shutil.copytree(runs / "edp2-ep2", tmp_path / "moved")
    line = f"--resume parallel.expert=2 train.steps=20 run_dir={tmp_path}/moved"
    results = run_ranks(2, "tests.distributed.resave", str(runs / "small.yaml"), line)
    assert results[0] == "step-000020"
    before, after = tensors(runs / "edp2-ep2"), tensors(tmp_path / "moved")
    for key, value in before.items():
        assert key.startswith("rng.") or torch.equal(value, after[key]), key
