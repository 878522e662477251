"""What is read of a forward pass: once, whatever is recomputed; and nothing when nobody reads."""

import numpy as np
import torch

from parallel.pipeline.split import whole
from tests.trainer.model.models_for_tests import build, config, mla, moe, some_tokens
from trainer.model import MicroBatch, MoETransformer, Share
from trainer.verify.forward import Forward
from trainer.verify.readings import Key, Readings
from trainer.verify.sums import COUNT, SAMPLED, WIDTH

SHAPE = config(attention=mla(), mtp_layers=1, moe=moe(aux_loss=0.01))
ROWS, LENGTH = 4, 8


def batches(size: int) -> list[MicroBatch]:
    tokens, labels = some_tokens(SHAPE, ROWS, LENGTH)
    positions = torch.arange(LENGTH).expand(size, LENGTH)
    share = Share(tokens=float(ROWS * (LENGTH - 1)), sequences=float(ROWS))
    return [
        MicroBatch(tokens[i : i + size], positions, None, labels[i : i + size], share) for i in range(0, ROWS, size)
    ]


def read(model: MoETransformer, reverse: bool = False, size: int = 2) -> Readings:
    readings, given = Readings("train", 1), batches(size)
    with Forward(model, readings, ROWS, LENGTH).watched(given, 0):
        for batch in given[::-1] if reverse else given:
            model.part(whole(SHAPE.num_layers), None, batch).backward()
    return readings


def test_recomputation_is_not_counted_again() -> None:
    once, again = read(build(SHAPE)), read(build(SHAPE, recompute=True))
    assert once.rows.keys() == again.rows.keys() and len(once.rows) > 100
    for key, row in once.rows.items():
        assert np.array_equal(row, again.rows[key]), key
    for key, pieces in once.pieces.items():
        assert all(np.array_equal(rows, again.pieces[key][first]) for first, rows in pieces.items())
    assert once.order == again.order


def test_how_the_batch_is_cut_means_nothing() -> None:
    """Sequences are known by their number in the global batch: only fp64 sums are added in another order."""
    expected = read(build(SHAPE))
    for other in (read(build(SHAPE), reverse=True), read(build(SHAPE), size=4), read(build(SHAPE), size=1)):
        for key, row in expected.rows.items():
            if key.kind != "loss":  # whose count is that of micro-batches
                np.testing.assert_allclose(other.rows[key], row, rtol=1e-11, atol=1e-11, err_msg=str(key))


def test_readings_are_of_the_whole_global_batch() -> None:
    readings = read(build(SHAPE))
    assert readings.rows[Key("train", 1, "forward", "norm")][COUNT] == ROWS * LENGTH * SHAPE.hidden_size
    experts = [row[COUNT] for key, row in readings.rows.items() if key.name.startswith("layers.1.moe.experts[")]
    assert len(experts) == 8 and sum(experts) == ROWS * LENGTH * SHAPE.moe.top_k * SHAPE.hidden_size
    chosen = readings.pieces[Key("train", 1, "experts", "layers.1.moe.router")]
    assert sorted(chosen) == [0, 2 * LENGTH] and all(rows.shape == (2 * LENGTH, 3) for rows in chosen.values())
    assert np.count_nonzero(readings.rows[Key("train", 1, "forward", "norm")][SAMPLED]) > 0


def test_nothing_is_left_of_it_and_nothing_large_is_kept() -> None:
    model = build(SHAPE)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    readings = read(model)
    for name, module in model.named_modules():
        assert set(vars(module)) == before[name]
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(row.shape == (WIDTH,) for row in readings.rows.values())


def test_margins_are_those_of_the_choice() -> None:
    """A score raised by a little more than the margin, and no less, changes the choice."""
    from trainer.model.router import Router
    from trainer.verify.routing import margins

    for groups in (1, 4):
        router = Router(moe(num_groups=groups, top_groups=min(2, groups), top_k=2), 4)
        router.expert_bias = torch.linspace(0, 0.1, 8)
        scores = torch.rand(1, 50, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        margin = margins(router, scores[0])
        chosen = router._select(scores).sort(-1).values
        assert (margin > 0).all()
        # Every score moves by less than half the margin of an expert, or a fourth of that of a pair: no choice changes.
        noise = torch.rand(20, 50, 8, generator=torch.Generator().manual_seed(4)).double() * 2 - 1
        moved = scores + noise * margin[:, None] / (4.01 if groups > 1 else 2.01)
        assert (router._select(moved).sort(-1).values == chosen).all()
        if groups == 1:  # the last chosen falls behind the next
            best = (scores + router.expert_bias).topk(2, -1).indices[..., -1:]
            lower = scores.scatter_add(-1, best, -1.001 * margin[None, :, None])
            assert (router._select(lower).sort(-1).values != chosen).any(-1).all()
