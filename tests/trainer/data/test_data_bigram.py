"""The bigram baseline: normalised, right on a case worked by hand, and better than simpler smoothing."""

import time

import numpy as np
import pytest
import torch

from trainer.data import Batch, bigram_loss
from trainer.data.bigram import Bigram


def markov(length: int, vocab_size: int, seed: int) -> np.ndarray:
    """Tokens of a random Markov chain with Zipf-like preferences; the same chain for every seed."""
    ranks = np.random.default_rng(0).permuted(np.tile(np.arange(vocab_size), (vocab_size, 1)), axis=1)
    weights = 1 / (1.0 + np.arange(vocab_size)) ** 1.3
    steps = np.random.default_rng(seed).choice(vocab_size, size=length, p=weights / weights.sum())
    tokens = np.zeros(length, np.int64)
    for i in range(1, length):
        tokens[i] = ranks[tokens[i - 1], steps[i]]
    return tokens


@pytest.mark.parametrize("length", [0, 1, 2, 3, 50, 5000])
def test_sums_to_one_for_every_context(length: int) -> None:
    bigram = Bigram(markov(length, 40, 1), 41)  # token 40 is never seen
    table = bigram.probability(np.arange(41)[:, None], np.arange(41)[None, :])
    assert table.shape == (41, 41)
    assert (table > 0).all()
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-12)


def test_against_a_hand_computation() -> None:
    # Pairs of 0 1 0 1 0 2 0 1 1: 01 three times, 10 twice, 02, 20 and 11 once.
    # Counts of counts n1 = 3, n2 = 1, n3 = 1, n4 = 0, so Y = 3 / (3 + 2) = 0.6 and
    # D1 = 1 - 2 * 0.6 * 1/3 = 0.6, D2 = 2 - 3 * 0.6 * 1/1 = 0.2, D3 = 3 - 4 * 0.6 * 0/1 = 3, held at 2.7.
    # Different tokens in front of 0: {1, 2}, of 1: {0, 1}, of 2: {0}: counts 2, 2, 1 of 5, n1 = 1, n2 = 2, n3 = 0, so
    # Y = 1 / (1 + 4) = 0.2, D1 = 1 - 2 * 0.2 * 2/1 = 0.2, D2 = 2 - 3 * 0.2 * 0/2 = 2, held at 1.8.
    left = (0.2 + 1.8 + 1.8) / 5
    unigram = [0.2 / 5 + left / 4, 0.2 / 5 + left / 4, 0.8 / 5 + left / 4, left / 4]
    after_0 = (2.7 + 0.6) / 4  # of 01 three times and 02 once
    after_1 = (0.2 + 0.6) / 3  # of 10 twice and 11 once
    expected = {
        (0, 1): (3 - 2.7) / 4 + after_0 * unigram[1],
        (0, 2): (1 - 0.6) / 4 + after_0 * unigram[2],
        (0, 3): after_0 * unigram[3],
        (1, 0): (2 - 0.2) / 3 + after_1 * unigram[0],
        (1, 2): after_1 * unigram[2],
        (2, 0): (1 - 0.6) / 1 + 0.6 * unigram[0],
        (3, 1): unigram[1],
    }
    train = np.array([0, 1, 0, 1, 0, 2, 0, 1, 1])
    bigram = Bigram(train, 4)
    for (context, following), probability in expected.items():
        assert bigram.probability(np.array(context), np.array(following)) == pytest.approx(probability, rel=1e-12)
    tokens, labels = np.array(list(expected)).T
    loss = bigram_loss(train, (tokens, labels), 4)
    assert loss == pytest.approx(-np.mean(np.log(list(expected.values()))), rel=1e-12)


def test_rows_are_not_joined() -> None:
    rows = np.array([[0, 1, 2], [3, 4, 5]])
    assert Bigram(rows, 6)._pairs_P.tolist() == [0 * 6 + 1, 1 * 6 + 2, 3 * 6 + 4, 4 * 6 + 5]
    assert 2 * 6 + 3 in Bigram(rows.reshape(-1), 6)._pairs_P


def test_batch_and_arrays_give_the_same_and_ignored_labels_do_not_count() -> None:
    train, tokens = markov(2000, 30, 1), markov(200, 30, 2)
    labels = np.roll(tokens, -1)
    labels[::5] = -100
    expected = bigram_loss(train, (tokens[labels >= 0], labels[labels >= 0]), 30)
    assert bigram_loss(train, (tokens, labels), 30) == expected
    tensors = [torch.from_numpy(array.reshape(10, 20)) for array in (tokens, labels, tokens, tokens)]
    assert bigram_loss(train, Batch(*tensors), 30) == expected


def test_is_a_good_smoothed_bigram() -> None:
    vocab_size = 200
    held_out = markov(20_001, vocab_size, 9)
    contexts, nexts = held_out[:-1], held_out[1:]
    weights = 1 / (1.0 + np.arange(vocab_size)) ** 1.3
    weights /= weights.sum()
    entropy = -(weights * np.log(weights)).sum()  # no model can do better
    for length in (3_000, 30_000, 300_000):
        train = markov(length, vocab_size, 1)
        loss = bigram_loss(train, (contexts, nexts), vocab_size)
        pairs = np.zeros((vocab_size, vocab_size))
        np.add.at(pairs, (train[:-1], train[1:]), 1)
        unigram = (np.bincount(train, minlength=vocab_size) + 1) / (length + vocab_size)
        totals, kinds = pairs.sum(1, keepdims=True), (pairs > 0).sum(1, keepdims=True)
        witten_bell = (pairs + kinds * unigram) / np.maximum(totals + kinds, 1)
        assert loss < -np.log(witten_bell[contexts, nexts]).mean()
        assert loss < -np.log(((pairs + 0.1) / (totals + 0.1 * vocab_size))[contexts, nexts]).mean()
    assert entropy - 0.05 < loss < entropy + 0.05


def test_takes_seconds_at_full_size() -> None:
    train = np.random.default_rng(0).zipf(1.3, 1_000_000) % 4096
    begin = time.process_time()
    bigram_loss(train, (train[:100_000], train[1:100_001]), 4096)
    assert time.process_time() - begin < 5


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="every label is -100; give validation data"):
        bigram_loss(np.arange(5), (np.arange(3), np.full(3, -100)), 10)
    with pytest.raises(ValueError, match="token 12 is not below vocab_size=10; pass the model's"):
        bigram_loss(np.arange(13), (np.arange(3), np.arange(3)), 10)
