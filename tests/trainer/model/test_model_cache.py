"""A text that is run in pieces behind a cache gives the logits of the whole text."""

import pytest
import torch
from torch import Tensor

from tests.trainer.model.models_for_tests import build, config, distance, gqa, mla, moe, some_tokens
from trainer.model import Cache, ModelConfig, MoETransformer
from trainer.model.config import RopeConfig, YarnConfig
from trainer.model.rope import rotations

LENGTH = 12
YARN = YarnConfig(factor=4.0, original_max_position=8, beta_fast=4.0, beta_slow=0.5, mscale=1.3, mscale_all_dim=0.7)
SHAPES = {
    "gqa": config(),
    "gqa with everything": config(
        num_layers=4,
        attention=gqa(head_dim=8, bias=True, output_bias=True, sinks=True, window=4, full_every=2),
        rope=RopeConfig(fraction=0.5, yarn=YARN),
        mtp_layers=1,
    ),
    "a window of one": config(attention=gqa(window=1)),
    "a window longer than the text": config(attention=gqa(window=LENGTH + 5)),
    "mla": config(attention=mla(), mtp_layers=1),
    "mla interleaved": config(attention=mla(), rope=RopeConfig(interleaved=True, yarn=YARN)),
    "mla without q_lora": config(attention=mla(q_lora_rank=0), rope=RopeConfig(interleaved=True)),
}
PIECES = {"one": [LENGTH], "tokens": [1] * LENGTH, "uneven": [5, 1, 3, 2, 1], "late": [1, 11]}


@torch.no_grad()
def in_pieces(model: MoETransformer, tokens: Tensor, pieces: list[int], cache: Cache) -> Tensor:
    """Logits of all tokens, run one piece behind another."""
    return torch.cat([model(piece, cache=cache) for piece in tokens.split(pieces, 1)], 1)


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_the_whole_text(shape: ModelConfig, pieces: list[int]) -> None:
    model = build(shape)
    tokens, _ = some_tokens(shape, 3, LENGTH)
    with torch.no_grad():
        whole = model(tokens)
    # fp64 has an eps of 2e-16. The sums are the same but in another order, and MLA multiplies its matrices in another
    # one as well: 4e-15 is the most that was seen.
    assert distance(in_pieces(model, tokens, pieces, Cache(LENGTH)), whole) <= 2e-14


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_text_in_one_piece_changes_no_bit(shape: ModelConfig) -> None:
    model = build(shape)
    tokens, _ = some_tokens(shape, 3, LENGTH)
    with torch.no_grad():
        assert torch.equal(in_pieces(model, tokens, [LENGTH], Cache(LENGTH)), model(tokens))


@pytest.mark.parametrize("shape", [SHAPES["gqa with everything"], SHAPES["mla"]])
def test_a_cleared_cache_has_forgotten_everything(shape: ModelConfig) -> None:
    model, cache = build(shape), Cache(LENGTH)
    before, _ = some_tokens(shape, 2, LENGTH, seed=2)
    tokens, _ = some_tokens(shape, 2, LENGTH)
    in_pieces(model, before, [LENGTH], cache)
    cache.clear()
    assert torch.equal(in_pieces(model, tokens, [3, 4, 5], cache), in_pieces(model, tokens, [3, 4, 5], Cache(LENGTH)))


def test_the_cache_has_as_much_as_is_said() -> None:
    """Elements for each layer: rows, tokens and what attention reads of one."""

    def kept(shape: ModelConfig) -> list[int]:
        model, cache = build(shape), Cache(LENGTH)
        tokens, _ = some_tokens(shape, 2, 5)
        in_pieces(model, tokens, [3, 2], cache)
        places = [x.data_ptr() for layer in cache.kept.values() for x in layer]
        in_pieces(model, tokens, [5], cache)
        assert places == [x.data_ptr() for layer in cache.kept.values() for x in layer]  # allocated once
        return [sum(x.numel() for x in layer) for layer in cache.kept.values()]

    keys_and_values = 2 * 2 * 8  # two heads of 8
    everything = SHAPES["gqa with everything"]  # every second layer sees all, the others 4 positions with their own
    assert kept(everything) == [2 * length * keys_and_values for length in (3, LENGTH, 3, LENGTH)]
    attention = SHAPES["mla"].attention
    per_token = attention.kv_lora_rank + attention.qk_rope_head_dim
    assert kept(SHAPES["mla"]) == [2 * LENGTH * per_token] * 3


@pytest.mark.parametrize("attention", [gqa(), mla()], ids=["gqa", "mla"])
def test_nothing_is_dropped_behind_a_cache(attention) -> None:
    """Room is shared out over a whole sequence, by later tokens too: a text that grows cannot know it."""
    tight = config(attention=attention, moe=moe(capacity_factor=0.5))
    roomy = config(attention=attention, moe=moe(capacity_factor=None))
    tokens, _ = some_tokens(tight, 2, LENGTH)
    with torch.no_grad():
        whole, dropped = build(roomy)(tokens), build(tight)(tokens)
    assert distance(dropped, whole) > 0.01
    for pieces in PIECES.values():
        assert distance(in_pieces(build(tight), tokens, pieces, Cache(LENGTH)), whole) <= 2e-14


def test_text_that_is_written_is_not_counted() -> None:
    model = build(config(moe=moe(aux_loss=0.1)))
    tokens, _ = some_tokens(model.config, 1, 4)
    in_pieces(model, tokens, [3, 1], Cache(LENGTH))
    assert model.meters.take() == ({}, {})
    with torch.no_grad():
        model(tokens)
    assert model.meters.take()[1]


def test_a_rotation_does_not_depend_on_the_piece() -> None:
    """Angles are fp32 whatever the model is: a last bit of them would be 1e-7 in the logits above."""
    whole = rotations(RopeConfig(yarn=YARN), 20, torch.arange(100)[None])
    for first, count in ((0, 1), (7, 3), (63, 37)):
        piece = rotations(RopeConfig(yarn=YARN), 20, torch.arange(first, first + count)[None])
        assert all(torch.equal(x, y[:, first : first + count]) for x, y in zip(piece, whole, strict=True))


def test_narrow_weights_keep_narrow_tensors() -> None:
    """In bf16 the compressed form rounds in other places: as close as bf16 weights are to fp32 ones."""
    shape = SHAPES["mla"]
    tokens, _ = some_tokens(shape, 2, LENGTH)
    model, exact = build(shape, torch.bfloat16), build(shape)
    for ours, theirs in zip(exact.parameters(), model.parameters(), strict=True):
        ours.data.copy_(theirs)
    with torch.no_grad():
        whole, reference = model(tokens), exact(tokens)
    cache = Cache(LENGTH)
    found = in_pieces(model, tokens, [5, 1, 1, 5], cache)
    assert {x.dtype for layer in cache.kept.values() for x in layer} == {torch.bfloat16}
    # Behind the first piece. Each rounding is 0.4 %; the whole text in bf16 lies 1.6 % away from fp64, this 2.3 %.
    assert distance(found[:, 5:], reference[:, 5:]) <= 0.05 and distance(whole, reference) <= 0.05
