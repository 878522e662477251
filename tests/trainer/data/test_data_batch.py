"""Batches: documents, positions and labels against a plain loop."""

import numpy as np
import pytest
import torch

from trainer.data import Batch
from trainer.data.batch import make_batch


def random_rows(rows: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens of documents 1 to 9 tokens long, the first and last of a row cut anywhere."""
    chance = np.random.default_rng(seed)
    lengths = chance.integers(1, 10, size=rows * length)
    documents = np.repeat(np.arange(len(lengths)), lengths)[3 : 3 + rows * length]
    return chance.integers(0, 500, size=(rows, length)), documents.reshape(rows, length)


@pytest.mark.parametrize("seed", range(5))
def test_boundaries_against_a_plain_loop(seed: int) -> None:
    tokens, documents = random_rows(6, 33, seed)
    batch = make_batch(tokens, documents, reset_at_documents=True)
    for b in range(6):
        position, number = 0, 0
        for s in range(32):
            if s and documents[b, s] != documents[b, s - 1]:
                position, number = 0, number + 1
            ends = documents[b, s + 1] != documents[b, s]
            assert batch.tokens_BS[b, s] == tokens[b, s]
            assert batch.labels_BS[b, s] == (-100 if ends else tokens[b, s + 1])
            assert batch.positions_BS[b, s] == position
            assert batch.documents_BS[b, s] == number
            position += 1
    assert (batch.labels_BS == -100).sum() > 20


def test_without_reset_a_row_is_one_document() -> None:
    tokens, documents = random_rows(4, 17, 0)
    batch = make_batch(tokens, documents, reset_at_documents=False)
    assert batch.tokens_BS.tolist() == tokens[:, :-1].tolist()
    assert batch.labels_BS.tolist() == tokens[:, 1:].tolist()
    assert batch.positions_BS.tolist() == [list(range(16))] * 4
    assert not batch.documents_BS.any()


@pytest.mark.parametrize("reset", [False, True])
def test_shapes_splitting_and_moving(reset: bool) -> None:
    batch = make_batch(*random_rows(7, 9, 1), reset_at_documents=reset)
    tensors = ["tokens_BS", "labels_BS", "positions_BS", "documents_BS"]
    assert len(batch) == 7
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 3, 1]
    for name in tensors:
        whole = getattr(batch, name)
        assert whole.shape == (7, 8) and whole.dtype == torch.int64 and whole.device.type == "cpu"
        assert whole.is_contiguous()
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)
        assert getattr(batch.to("meta"), name).device.type == "meta"
    empty = make_batch(np.zeros((0, 9), np.int64), np.zeros((0, 9), np.int64), reset)
    assert isinstance(empty, Batch) and len(empty) == 0 and empty.labels_BS.shape == (0, 8) and empty.split(3) == []
