"""What a dry run says of small layouts, against closed formulas: equal to the byte, because nothing there is rounded.

What resident memory really grows to is compared in tests/distributed/test_dry_run.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import backends
from parallel.pipeline.pipeline import held_by
from tests.distributed.ranks import run_ranks
from tests.small import small_config
from tests.trainer.dry_run_cases import LAYOUT, SCHEDULES
from trainer.build import layers_per_stage
from trainer.config.schema import Config
from trainer.dry_run.memory import Memory
from trainer.model import MoETransformer
from trainer.optimizer import parameter_groups


@pytest.fixture(scope="module")
def found(small: Path) -> dict[str, Any]:
    return run_ranks(1, "tests.trainer.dry_run_cases", str(small))[0]


class Rank:
    """What a rank of a layout holds, counted from the model's definition."""

    def __init__(self, config: Config, world: int, rank: int) -> None:
        layout = config.parallel
        pipelines = world // layout.pipeline
        counts = layers_per_stage(config)
        held = held_by(rank // pipelines, layout.pipeline, counts, layout.schedule)
        self.model = MoETransformer(config.model, backends.select("cpu").ops, parts=[part for _, part in held])
        for _, moe in self.model.moe_layers():
            share = moe.experts.total // layout.expert
            moe.experts.shard(0, share)
        copy = self.model.embedding_copy
        self.copy = 0 if copy is None else copy.numel()
        self.layers = sum(1 for _ in self.model.moe_layers())
        self.groups: list[tuple[str, int, int]] = []  # axis, elements with DeepSpeed's padding, replicas
        for group in parameter_groups(self.model, 0.1):
            replicas = pipelines // layout.expert if group.expert else pipelines
            elements = sum(parameter.numel() for parameter in group.parameters)
            if elements:
                unit = 2 * replicas
                self.groups.append(("edp" if group.expert else "dp", -(-elements // unit) * unit, replicas))

    def sums(self, axis: str) -> Iterator[tuple[int, int]]:
        return ((size, replicas) for name, size, replicas in self.groups if name == axis)

    def expected(self, weight: int, master: int, gradients: int = 1) -> dict[str, int]:
        """Bytes where a weight has ``weight`` and an element of the optimizer's part ``master``."""
        flat = sum(size for _, size, _ in self.groups)
        parts = sum(size // replicas for _, size, replicas in self.groups)
        return {
            "weights": weight * (flat + self.copy),
            "gradients": 4 * (parts if gradients == 2 else flat) + 4 * self.copy,
            "optimizer": master * parts,
            "buffers": 4 * 8 * self.layers,
        }


@pytest.mark.parametrize(
    ("case", "world", "rank", "weight", "master", "overrides"),
    [
        ("alone", 1, 0, 4, 8, ()),
        ("narrow", 1, 0, 2, 12, ("train.precision=bf16",)),
        ("first", 8, 0, 4, 8, LAYOUT),
        ("last", 8, 7, 2, 12, (*LAYOUT, "train.precision=bf16")),
        ("zero-2", 4, 3, 4, 8, ("parallel.zero=2", "train.global_batch_tokens=1024")),
    ],
)
def test_what_is_held_between_steps(
    case: str,
    world: int,
    rank: int,
    weight: int,
    master: int,
    overrides: tuple[str, ...],
    small: Path,
    found: dict[str, Any],
) -> None:
    config = small_config(small, *overrides)
    expected = Rank(config, world, rank).expected(weight, master, config.parallel.zero)
    assert {name: found[case]["at_peak"][name] for name in expected} == expected
    assert sum(found[case]["at_peak"].values()) == found[case]["peak"]


@pytest.mark.parametrize(("case", "there", "back"), [("first", 64, 64), ("busy", 64, 128)])
def test_what_is_sent(case: str, there: int, back: int, small: Path, found: dict[str, Any]) -> None:
    """128 choices of 64 tokens: half go to the other rank. One with 1.5 times its share gets 128 of its 64 + 128 rows
    from there, and sends as many back."""
    config = small_config(small, *LAYOUT)
    rank, sent, micros = Rank(config, 8, 0), found[case]["sent"], 8
    row, hidden, embedding = 32 * 4, 2 * 32 * 32 * 4, 320 * 32 * 4
    # Rows to the experts and their gradients back, results back and their gradients there; and the rows of 4 experts.
    exchanged = 2 * (there + back) * row + 4 * 8
    expected = {
        "ep all-to-all": [5 * micros * rank.layers, micros * rank.layers * exchanged],
        # The embedding's new value for the last stage; and torch's stages vote over 4 bytes before their first step.
        "pp send": [micros + 1 + 1, micros * hidden + embedding + 4],
    }
    for axis in ("dp", "edp"):  # parts of gradients to their owners, and the own part of the weights to all
        sums = list(rank.sums(axis))
        calls = sum(2 * (replicas - 1) for _, replicas in sums)
        expected[f"{axis} send"] = [calls, sum(2 * (r - 1) * 4 * size // r for size, r in sums)]
    # Rings: labels of the batch and the norm (8 bytes each); 4 losses and a wish to stop; 8 counts of 3 layers.
    expected["dp all-reduce"] = [2, 2 * (2 * 8 * 3 // 4)]
    expected["pp all-reduce"] = [1, 8]
    expected["world all-reduce"] = [2, 2 * 20 * 7 // 8 + 2 * 3 * 64 * 7 // 8]
    assert sent == expected


@pytest.mark.parametrize(("case", "count"), [("alone", 4), ("uneven", 2), ("roomy", 1)])
def test_micro_batches_are_those_of_a_step(case: str, count: int, found: dict[str, Any]) -> None:
    """Without a pipeline the last may be smaller than the others, and the only one than was asked for."""
    assert found[case]["micro_batches"] == count


@pytest.mark.slow
def test_short_ways_change_nothing(small: Path) -> None:
    """Shapes that are remembered are those that torch's fake tensors find, under every schedule.

    And without a pipeline two micro-batches tell what eight would, but for their share of the batch: 8 bytes a token.
    """
    found = run_ranks(1, "tests.trainer.dry_run_cases", str(small), "schedules")[0]
    few, every = found.pop("none")
    assert every["peak"] - few["peak"] == 8 * (512 - 128)
    assert few["sent"] == every["sent"] and few["micro_batches"] == every["micro_batches"] == 8
    assert list(found) == list(SCHEDULES)
    for short, long in found.values():
        assert short == long


def test_memory_is_counted_once_and_given_back() -> None:
    import torch

    memory = Memory()
    block = torch.empty(100)
    memory.see(block)
    memory.see(block[:10])  # the same storage
    memory.put("weights", [block])
    short = torch.empty(1000)
    memory.see(short)
    del short
    memory.see(later := torch.empty(10))
    assert (memory.now, memory.peak) == (440, 4400)
    assert {name: size for name, size in memory.at_peak().items() if size} == {"weights": 400, "temporary": 4000}
    memory.forget_peak()
    assert memory.peak == 440
    del later
    assert memory.now == 400
