"""A smoothed bigram model: the baseline that a trained model has to beat.

Interpolated modified Kneser-Ney (Chen and Goodman 1999, "An empirical study of smoothing techniques for language
modeling", equations 26 and 27), over a Kneser-Ney unigram that is interpolated with the uniform distribution.
"""

import numpy as np

from backends.operations import IGNORED
from trainer.data.batch import Batch


class Bigram:
    """P(next token | token), positive everywhere and summing to 1 over the vocabulary for every context.

    Args:
        train: token ids of shape (..., T); pairs are taken along the last axis only.
        vocab_size: V, larger than every id.
    """

    def __init__(self, train: np.ndarray, vocab_size: int) -> None:
        train = np.asarray(train, dtype=np.int64)
        self.vocab_size = vocab_size
        pairs = (train[..., :-1] * vocab_size + train[..., 1:]).reshape(-1)
        self._pairs_P, counts_P = np.unique(pairs, return_counts=True)
        contexts_P, nexts_P = np.divmod(self._pairs_P, vocab_size)
        totals_V = np.bincount(contexts_P, weights=counts_P, minlength=vocab_size)
        self._kept_P, self._left_V = _discounted(counts_P, contexts_P, totals_V)
        self._kept_P /= totals_V[contexts_P]

        # The lower order counts the different tokens that each token follows, not how often it occurs.
        follows_V = np.bincount(nexts_P, minlength=vocab_size)
        seen = np.flatnonzero(follows_V)
        total = np.array([max(1, len(self._pairs_P))], dtype=float)
        kept, left = _discounted(follows_V[seen], np.zeros(len(seen), np.int64), total)
        self._unigram_V = np.full(vocab_size, left[0] / vocab_size)
        self._unigram_V[seen] += kept / total

    def probability(self, contexts: np.ndarray, nexts: np.ndarray) -> np.ndarray:
        """P(nexts | contexts) for id arrays that broadcast together; float64."""
        wanted = contexts * self.vocab_size + nexts
        lower = self._left_V[contexts] * self._unigram_V[nexts]
        if not len(self._pairs_P):
            return lower
        place = np.minimum(np.searchsorted(self._pairs_P, wanted), len(self._pairs_P) - 1)
        return np.where(self._pairs_P[place] == wanted, self._kept_P[place], 0.0) + lower


def bigram_loss(train: np.ndarray, validation: Batch | tuple[np.ndarray, np.ndarray], vocab_size: int) -> float:
    """Mean negative natural logarithm of a bigram model's probability of each label.

    Args:
        train: token ids to fit on: a 1-D array, or rows of consecutive tokens as ``SequenceReader.tokens`` gives.
        validation: the batch to score on, or its (tokens, labels) as arrays of equal shape; labels of -100 are left
            out.
        vocab_size: entries of the vocabulary, over which each prediction sums to 1.

    Raises:
        ValueError: if no label is left to score, or an id is not below ``vocab_size``.
    """
    if isinstance(validation, Batch):
        validation = validation.tokens_BS.cpu().numpy(), validation.labels_BS.cpu().numpy()
    tokens, labels = (np.asarray(part, dtype=np.int64).reshape(-1) for part in validation)
    tokens, labels = tokens[labels != IGNORED], labels[labels != IGNORED]
    train = np.asarray(train)
    if not len(labels):
        raise ValueError("bigram_loss: every label is -100; give validation data with labels to score")
    largest = max(int(part.max(initial=0)) for part in (train, tokens, labels))
    if largest >= vocab_size:
        raise ValueError(f"bigram_loss: token {largest} is not below vocab_size={vocab_size}; pass the model's")
    return float(-np.log(Bigram(train, vocab_size).probability(tokens, labels)).mean())


def _discounted(counts_P: np.ndarray, groups_P: np.ndarray, totals_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take a discount off each count.

    Args:
        counts_P: positive counts.
        groups_P: the distribution that each belongs to.
        totals_G: sum of the counts of each distribution.

    Returns:
        The counts that are kept, and the share of each distribution that this leaves for the lower order: 1 where
        nothing was counted.
    """
    kept_P = counts_P - _discounts(counts_P)[np.minimum(counts_P, 3)]
    kept_G = np.bincount(groups_P, weights=kept_P, minlength=len(totals_G))
    left_G = np.ones(len(totals_G))
    np.divide(totals_G - kept_G, totals_G, out=left_G, where=totals_G > 0)
    return kept_P, left_G


def _discounts(counts_P: np.ndarray) -> np.ndarray:
    """(0, D1, D2, D3+) of equation 26, kept clear of 0 and of the count itself, where little data can push them."""
    n = np.bincount(np.minimum(counts_P, 5), minlength=6)[1:5].astype(float)
    y = n[0] / (n[0] + 2 * n[1]) if n[0] and n[1] else 0.5
    discounts = [0.0]
    for k in (1, 2, 3):
        best = k - (k + 1) * y * n[k] / n[k - 1] if n[k - 1] else k * 0.5
        discounts.append(float(np.clip(best, 0.1 * k, 0.9 * k)))
    return np.array(discounts)
