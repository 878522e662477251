"""The configs of published models have the published sizes, and every family's tiny member trains."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from models_for_tests import MODELS, OPS, published

from tests.small import write_inputs
from trainer.config.load import load_config
from trainer.loop import Loop
from trainer.model import MoETransformer
from trainer.model.count import count_parameters
from trainer.setup import prepare


class Published(NamedTuple):
    """Billions, and how far a rounded figure may be off beyond the half per cent that all may."""

    total: float
    rounding: float = 0.0
    active: float | None = None
    embedding: bool = False  # whether the active parameters count the whole embedding, of which a token reads a row


# Totals without multi-token prediction, except GLM's: those are what its files hold, with MTP and its copies of
# embedding and head.
PUBLISHED = {
    "telechat3-105b": Published(102.3, active=4.68, embedding=True),
    "deepseek-v3": Published(671, active=36.6),
    "kimi-k2": Published(1000, rounding=50, active=32),
    "gpt-oss-120b": Published(116.83, active=5.13),
    "gpt-oss-20b": Published(20.91, active=3.61),
    "qwen3-30b-a3b": Published(30.5),
    "qwen3-235b-a22b": Published(235, active=22.2, embedding=True),
    "glm-4.5": Published(358),
    "glm-4.5-air": Published(110),
    "ling-plus": Published(290),
    "ling-lite": Published(16.8, active=2.75, embedding=True),
    "ling-1t": Published(1000, active=50),
    "ling-mini-2.0": Published(16, rounding=0.5, active=1.43, embedding=True),
    "telechat2-39b": Published(39, rounding=0.5, active=12.1, embedding=True),
    "telechat3-1t": Published(1100, rounding=50),  # only its size is published; the shape is ours
}


def test_every_config_is_in_the_table() -> None:
    assert {path.stem for path in MODELS.glob("*.yaml")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name: str) -> None:
    figures = PUBLISHED[name]
    counts = count_parameters(MoETransformer(published(name), OPS, device="meta"))
    further = counts.pop("multi-token prediction", None)
    total = sum(count.total for count in counts.values())
    active = sum(count.active for count in counts.values())
    if name.startswith("glm") and further:
        total += further.total + counts["embedding"].total + counts["head"].total
    if figures.embedding:
        active += counts["embedding"].total
    assert abs(total / 1e9 - figures.total) <= max(0.005 * figures.total, figures.rounding)
    assert figures.active is None or active / 1e9 == pytest.approx(figures.active, rel=0.01)


def test_gpt_oss_has_its_published_number_of_parameters() -> None:
    """116.83 B and 20.91 B in the model card, to the last digit given."""
    for name, billions in (("gpt-oss-120b", "116.83"), ("gpt-oss-20b", "20.91")):
        model = MoETransformer(published(name), OPS, device="meta")
        assert f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}" == billions


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("families")).parent


def _by_cost(path: Path) -> Any:
    """Two with the most features stand for all where every second counts."""
    few = path.stem in ("gpt-oss", "telechat3")
    return pytest.param(path, id=path.stem, marks=() if few else pytest.mark.slow)


@pytest.mark.parametrize("path", [_by_cost(path) for path in sorted((MODELS / "tiny").glob("*.yaml"))])
def test_a_tiny_member_of_each_family_trains(path: Path, texts: Path, tmp_path: Path, alone: None) -> None:
    places = [f"data.paths=[{texts}/texts]", f"data.cache_dir={texts}/cache", f"run_dir={tmp_path}", "data.source=text"]
    config = load_config(str(path), [*places, "train.log_every=1", "metrics.tensorboard=false"])
    run = prepare(config, str(path), resume=False)
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    assert Loop(run).train()
    still = [name for name, value in run.model.named_parameters() if before[name].equal(value)]
    assert not still, "every parameter learns"
