"""What is kept of a tensor: pieces add up, and the sketch tells how far two tensors lie apart."""

import numpy as np
import pytest
import torch

from tests.distributed.checkpoint_cases import peak_growth
from trainer.verify.distance import distance
from trainer.verify.sums import COUNT, LARGEST, SAMPLED, SKETCH, SQUARE, SUM, add, row_of


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_figures_are_those_of_the_tensor() -> None:
    x = values(300, 1000)
    row, exact = row_of(x, 0, x.numel()), x.double()
    assert row[COUNT] == 300_000
    # fp64 sums in another order: 2e-16 an addition.
    assert row[SUM] == pytest.approx(float(exact.sum()), rel=1e-10)
    assert row[SQUARE] == pytest.approx(float(exact.square().sum()), rel=1e-12)
    assert row[LARGEST] == float(exact.abs().max())
    assert np.isin(row[SAMPLED], exact.numpy()).all() and len(set(row[SAMPLED])) == len(row[SAMPLED])


def test_pieces_add_up_to_the_whole_whatever_their_cut() -> None:
    x = values(200_000)
    whole, cuts, total = row_of(x, 0, len(x)), [0, 7, 70_001, 131_072, 200_000], None
    for first, last in zip(cuts, cuts[1:], strict=False):
        total = add(total, row_of(x[first:last], first, len(x)))
    np.testing.assert_allclose(total, whole, rtol=1e-9, atol=1e-9)
    assert (total[SAMPLED] == whole[SAMPLED]).all()


def test_memory_layout_and_dtype_mean_nothing() -> None:
    x = values(300, 700).bfloat16()
    turned = x.t().contiguous().t()
    assert not turned.is_contiguous()
    for other in (turned, x.double()):
        np.testing.assert_allclose(row_of(other, 0, x.numel()), row_of(x, 0, x.numel()), rtol=1e-9, atol=1e-9)


def test_the_sketch_estimates_the_norm_of_a_difference() -> None:
    """Within a factor of a few, also where all of it has one sign, as scaling has. The signs are the same for all."""
    ratios = []
    for seed in range(200):
        x, noise = values(5000, seed=seed), 1e-4 * (1 + values(5000, seed=seed + 1000))
        one, other = row_of(x, 0, 5000), row_of(x + noise, 0, 5000)
        found = np.linalg.norm(one[SKETCH] - other[SKETCH]) ** 2 / float(noise.double().square().sum())
        ratios.append(found)
    assert min(ratios) > 0.05 and max(ratios) < 5
    assert 0.5 < np.mean(ratios) < 2  # without signs in the sketch: 300


def test_a_permutation_is_seen_though_all_sums_are_the_same() -> None:
    x = values(64, 32)
    one, other = row_of(x, 0, x.numel()), row_of(x.roll(1, 0), 0, x.numel())
    assert one[SQUARE] == pytest.approx(other[SQUARE]) and one[LARGEST] == other[LARGEST]
    assert distance(one, other, "forward") > 0.3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_far_from_everything(bad: float) -> None:
    x = values(100)
    broken = x.clone()
    broken[50] = bad
    sound, row = row_of(x, 0, 100), row_of(broken, 0, 100)
    assert distance(sound, row, "forward") == np.inf and distance(row, row, "forward") == 0


def test_nothing_of_a_large_tensor_is_copied() -> None:
    """32 MB; what a block of 65,536 elements takes in fp64, with its hashes, is about 4."""
    x = torch.randn(8, 2**20)
    row_of(x[:1], 0, x.numel())
    growth = {"contiguous": peak_growth(lambda: row_of(x, 0, x.numel()))}
    growth["turned"] = peak_growth(lambda: row_of(x.view(2**10, -1).t(), 0, x.numel()))
    assert max(growth.values()) < 12 * 2**20, growth
