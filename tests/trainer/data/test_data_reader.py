"""Readers, packed and streaming: one order whatever the layout, exact resumes, and what the mistakes say."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import made_up, write_jsonl

from backends.errors import UserError
from trainer.config.schema import DataConfig
from trainer.data import (
    Batch,
    SequenceReader,
    beginnings,
    documents,
    load_tokenizer,
    open_data,
    sources,
    streaming,
)
from trainer.data.files import stdlib_files
from trainer.data.sources import training_documents

MakeConfig = Callable[..., DataConfig]
STYLES = [(False, False), (False, True), (True, False), (True, True)]  # (streaming, shuffle)


def readers(config: DataConfig, seed: int = 7) -> tuple[SequenceReader, SequenceReader]:
    return open_data(config, load_tokenizer(config, "c.yaml"), seed, "c.yaml")


def same(a: Batch, b: Batch) -> bool:
    names = ("tokens_BS", "labels_BS", "positions_BS", "documents_BS")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*(batch._tensors() for batch in batches), strict=True)))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows in the small corpus, of a size that no sequence or batch divides."""
    monkeypatch.setattr(streaming, "WINDOW", 5)
    monkeypatch.setattr(streaming, "SHUFFLED_WINDOW", 11)


@pytest.mark.parametrize(("stream", "shuffle"), STYLES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_see_what_one_sees(ranks: int, stream: bool, shuffle: bool, make_config: MakeConfig) -> None:
    config = make_config("jsonl", streaming=stream, shuffle=shuffle)
    alone = readers(config)[0]
    several = [readers(config)[0] for _ in range(ranks)]
    share = 8 // ranks
    for _ in range(60):  # more than an epoch
        whole = alone.read(8, range(8))
        parts = [reader.read(8, range(r * share, (r + 1) * share)) for r, reader in enumerate(several)]
        assert same(joined(parts), whole) and len(whole) == 8
    assert {reader.position for reader in several} == {480}
    assert all(reader.state_dict() == alone.state_dict() for reader in several)


@pytest.mark.parametrize(("stream", "shuffle"), STYLES)
def test_global_batch_size_does_not_change_the_order(stream: bool, shuffle: bool, make_config: MakeConfig) -> None:
    config = make_config("jsonl", streaming=stream, shuffle=shuffle)
    one, other = readers(config)[0], readers(config)[0]
    assert same(one.read(60, range(60)), joined([other.read(12, range(12)) for _ in range(5)]))
    assert same(one.read(8, range(1, 8, 3)), joined([other.read(1, range(i % 3 == 1)) for i in range(8)]))


@pytest.mark.parametrize(("stream", "shuffle"), STYLES)
def test_resume_is_exact_everywhere(stream: bool, shuffle: bool, make_config: MakeConfig) -> None:
    config = make_config("parquet", streaming=stream, shuffle=shuffle)
    reader = readers(config)[0]
    states, batches = [], []
    for _ in range(100):
        states.append(json.dumps(reader.state_dict()))
        batches.append(reader.read(5, range(1, 4)))
    if not stream:
        assert reader.num_sequences is not None and 250 < reader.num_sequences < 400  # resumed in two epochs
    for start in range(0, 97, 3):
        resumed = readers(config)[0]
        resumed.load_state_dict(json.loads(states[start]))
        assert resumed.position == 5 * start
        assert json.loads(json.dumps(resumed.state_dict())) == json.loads(states[start])
        for step in range(start, start + 3):
            assert json.loads(json.dumps(resumed.state_dict()["position"])) == 5 * step
            assert same(resumed.read(5, range(1, 4)), batches[step])


@pytest.mark.parametrize("source", ["hub", "text"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_resume_of_other_streams(source: str, shuffle: bool, make_config: MakeConfig) -> None:
    config = make_config(source, streaming=True, shuffle=shuffle)
    reader = readers(config)[0]
    for skipped in (0, 3, 41, 100, 200):
        reader.read(skipped, range(0))
        resumed = readers(config)[0]
        resumed.load_state_dict(json.loads(json.dumps(reader.state_dict())))
        twice = readers(config)[0]
        twice.load_state_dict(resumed.state_dict())
        ahead = resumed.read(9, range(9))
        assert same(twice.read(9, range(9)), ahead)
        assert same(reader.read(9, range(9)), ahead)


def test_resumed_stream_reads_at_most_a_window_again(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("jsonl", streaming=True, shuffle=True)
    reader = readers(config)[0]
    reader.read(250, range(0))
    resumed = readers(config)[0]
    resumed.load_state_dict(reader.state_dict())
    tokenized = []
    encode = resumed._tokenizer.encode_batch
    monkeypatch.setattr(resumed._tokenizer, "encode_batch", lambda texts: tokenized.extend(texts) or encode(texts))
    resumed.read(1, range(1))
    assert 1 <= len(tokenized) <= 11


@pytest.mark.parametrize("stream", [False, True])
def test_unshuffled_sequences_are_slices_of_the_joined_documents(stream: bool, make_config: MakeConfig) -> None:
    config = make_config("jsonl", streaming=stream, shuffle=False, reset_at_documents=False)
    tokenizer = load_tokenizer(config, "c.yaml")
    train, validation = readers(config)
    tokens: list[int] = []
    for document in training_documents(config, "c.yaml").open():
        tokens += [*tokenizer.encode(document.text), tokenizer.end_of_document]
    count = (len(tokens) - 1) // 16
    batch = train.read(2 * count, range(2 * count))
    for i in range(2 * count):
        start = i % count * 16
        assert batch.tokens_BS[i].tolist() == tokens[start : start + 16]
        assert batch.labels_BS[i].tolist() == tokens[start + 1 : start + 17]
    assert train.num_sequences == (None if stream else count)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "hub", "stdlib"])
def test_streaming_equals_packed(
    source: str, reset: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = stdlib_files("c.yaml")[:25]  # of 700, which would take ten seconds
    monkeypatch.setattr(sources, "stdlib_files", lambda where: files)
    packed = readers(make_config(source, shuffle=False, reset_at_documents=reset))
    stream = readers(make_config(source, shuffle=False, reset_at_documents=reset, streaming=True))
    for a, b in zip(packed, stream, strict=True):
        for _ in range(3):
            assert same(a.read(30, range(30)), b.read(30, range(30)))


def epochs(reader: SequenceReader, count: int) -> list[list[tuple[int, ...]]]:
    """The sequences of each of the first two epochs of ``count`` sequences."""
    return [[tuple(row) for row in reader.read(count, range(count)).tokens_BS.tolist()] for _ in range(2)]


def test_packed_shuffle_permutes_each_epoch_by_the_seed(make_config: MakeConfig) -> None:
    plain = readers(make_config("jsonl", shuffle=False))[0]
    config = make_config("jsonl", shuffle=True)
    count = plain.num_sequences
    assert count is not None
    (unshuffled, again), (first, second) = epochs(plain, count), epochs(readers(config)[0], count)
    assert unshuffled == again
    assert sorted(first) == sorted(second) == sorted(unshuffled)
    assert len({tuple(order) for order in (unshuffled, first, second)}) == 3
    np.random.seed(1)
    torch.manual_seed(1)
    assert epochs(readers(config)[0], count) == [first, second]
    assert epochs(readers(config, seed=8)[0], count)[0] != first
    assert epochs(readers(config, seed=-8)[0], count)[0] not in (first, epochs(readers(config, seed=8)[0], count)[0])


def test_streamed_shuffle_permutes_documents_within_windows(make_config: MakeConfig) -> None:
    config = make_config("jsonl", streaming=True, shuffle=True)
    tokenizer = load_tokenizer(config, "c.yaml")
    texts = [document.text for document in training_documents(config, "c.yaml").open()]
    config.sequence_length = 1
    reader = readers(config)[0]
    length = sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))
    orders = []
    for _ in range(2):
        ids = reader.read(length - 1, range(length - 1)).tokens_BS[:, 0].tolist()
        text = tokenizer.decode(ids).replace("<|endoftext|>", "\0").split("\0")
        assert [sorted(text[i : i + 11]) for i in range(0, len(text), 11)] == [
            sorted(texts[i : i + 11]) for i in range(0, len(texts), 11)
        ]
        places = [[texts[i : i + 11].index(t) for t in text[i : i + 11]] for i in range(0, 44, 11)]
        assert len({tuple(window) for window in places}) == 4  # no two windows are permuted alike
        orders.append(text)
    assert orders[0] != orders[1] and texts not in orders


@pytest.mark.parametrize("stream", [False, True])
def test_validation_keeps_its_order_ends_and_restarts(stream: bool, make_config: MakeConfig) -> None:
    config = make_config("jsonl", streaming=stream, shuffle=True)
    reader = readers(config)[1]
    whole = reader.read(10_000, range(10_000))
    count = len(whole)
    assert 30 < count == reader.position
    assert same(readers(config, seed=99)[1].read(10_000, range(10_000)), whole)
    assert len(reader.read(4, range(4))) == 0 and reader.position == count
    reader.restart()
    assert reader.position == 0
    several = [readers(config)[1] for _ in range(2)]
    together: list[Batch] = []
    while several[0].position < count:
        together += [several[r].read(8, range(4 * r, 4 * r + 4)) for r in range(2)]
        assert several[0].position == several[1].position <= count
    assert same(joined(together), whole)
    assert together[-1].tokens_BS.shape[1] == 16
    reader.read(count - 3, range(0))
    saved = reader.state_dict()
    resumed = readers(config)[1]
    resumed.load_state_dict(saved)
    assert len(resumed.read(8, range(8))) == 3
    ended = readers(config)[1]
    ended.load_state_dict(resumed.state_dict())
    assert len(ended.read(8, range(8))) == 0


@pytest.mark.parametrize(("stream", "shuffle"), STYLES)
def test_tokens_are_those_of_training(stream: bool, shuffle: bool, make_config: MakeConfig) -> None:
    config = make_config("jsonl", streaming=stream, shuffle=shuffle, reset_at_documents=False)
    reader = readers(config)[0]
    reader.read(13, range(0))
    before = json.dumps(reader.state_dict())
    for first, count in ((0, 20), (13, 4), (240, 120), (5, 0)):
        rows = reader.tokens(first, count)
        assert rows.shape == (count, 17) and rows.dtype == np.int64
        fresh = readers(config)[0]
        fresh.read(first, range(0))
        batch = fresh.read(count, range(count))
        assert rows[:, :-1].tolist() == batch.tokens_BS.tolist() and rows[:, 1:].tolist() == batch.labels_BS.tolist()
    assert json.dumps(reader.state_dict()) == before
    validation = readers(config)[1]
    assert len(validation.tokens(0, 10_000)) == len(validation.read(10_000, range(10_000)))


def test_document_boundaries_of_a_reader(make_config: MakeConfig) -> None:
    config = make_config("jsonl", shuffle=False)
    closing = load_tokenizer(config, "c.yaml").end_of_document
    batch = readers(config)[0].read(100, range(100))
    ends = batch.tokens_BS == closing
    assert ends.sum() > 10 and torch.equal(batch.labels_BS == -100, ends)
    assert torch.equal(batch.documents_BS[:, 1:] - batch.documents_BS[:, :-1], ends[:, :-1].long())
    assert (batch.positions_BS[:, 1:][ends[:, :-1]] == 0).all() and (batch.positions_BS[:, 0] == 0).all()


def refused(config: DataConfig, action: Callable[[SequenceReader, SequenceReader], object]) -> str:
    with pytest.raises(UserError) as caught:
        action(*readers(config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sequence_length": 8}, "data.sequence_length: 16 in the checkpoint and is 8 now; resume with"),
        ({"shuffle": False}, "data.shuffle: True in the checkpoint and is False now; resume with"),
        ({"paths": None}, "data.paths: gives another corpus than the one of the checkpoint; resume with"),
        ({"validation_fraction": 0.3}, "data.paths: gives another corpus than the one of the checkpoint; resume with"),
        (
            {"end_of_document": "<end>"},
            "data.tokenizer: gives another tokenizer than the one of the checkpoint; resume",
        ),
        ({"seed": 8}, "seed: 7 in the checkpoint and is 8 now; resume with"),
        ({"streaming": None}, "data.streaming: {} in the checkpoint and is {} now; resume with"),
    ],
)
def test_state_of_another_order_is_refused(
    stream: bool, change: dict, says: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    config = make_config("jsonl", streaming=stream)
    tokenizer = load_tokenizer(config, "c.yaml")
    reader = open_data(config, tokenizer, 7, "c.yaml")[0]
    reader.read(5, range(5))
    state = reader.state_dict()
    config = make_config("jsonl", streaming=stream)
    if "paths" in change:
        config.paths = [str(write_jsonl(tmp_path / "other.jsonl", made_up(90, seed=3)))]
    elif "streaming" in change:
        config.streaming = not stream
        says = says.format(stream, not stream)
    elif "end_of_document" in change:
        config.tokenizer.end_of_document = "<end>"
        tokenizer = load_tokenizer(config, "c.yaml")
    elif "seed" not in change:
        for name, value in change.items():
            setattr(config, name, value)
    other = open_data(config, tokenizer, change.get("seed", 7), "c.yaml")[0]
    first = other.state_dict()
    with pytest.raises(UserError) as caught:
        other.load_state_dict(state)
    assert str(caught.value).startswith(f"c.yaml: {says}"), caught.value
    assert other.state_dict() == first
    readers(make_config("jsonl", streaming=stream))[0].load_state_dict(state)  # and the right one takes it


@pytest.mark.parametrize("stream", [False, True])
def test_halves_without_text_are_refused(
    stream: bool, tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(train: SequenceReader, validation: SequenceReader) -> None:
        train.read(1, range(1))
        validation.read(1, range(1))

    config = make_config("jsonl", streaming=stream, paths=[str(write_jsonl(tmp_path / "one.jsonl", ["alone " * 90]))])
    for fraction in (1e-9, 1 - 1e-9):
        config.validation_fraction = fraction
        assert refused(config, use) == (
            "c.yaml: data.paths: hold fewer than two documents, one to train on and one to hold out; give more of "
            "them, or name held-out files in data.validation_paths"
        )
    # Among very many documents a fraction that is out of proportion is not mended.
    monkeypatch.setattr(documents, "_LOOKED_AT", 9)
    config = make_config("jsonl", streaming=stream, validation_fraction=1e-9)
    assert refused(config, use).startswith(
        "c.yaml: data.validation_fraction: 1e-09 leaves no validation document; raise"
    )
    tokenizer = load_tokenizer(config, "c.yaml")
    config.validation_fraction = 1 - 1e-9
    with pytest.raises(UserError, match="leaves no training document; lower it, or name held-out files in"):
        use(*open_data(config, tokenizer, 0, "c.yaml"))
    path = tmp_path / "hollow.jsonl"
    path.write_text('{"text": ""}\n')
    message = refused(make_config("jsonl", streaming=stream, validation_paths=[str(path)]), use)
    assert message == "c.yaml: data.validation_paths: hold no document; give files with text in them"
    message = refused(make_config("jsonl", streaming=stream, sequence_length=100_000), use)
    assert message.startswith("c.yaml: data.sequence_length: the ") and "do not fill one sequence of 100000" in message
    message = refused(make_config("jsonl", streaming=stream, sequence_length=0), use)
    assert message == "c.yaml: data.sequence_length: is 0; it must be at least 1"


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_the_beginnings_of_held_out_documents(
    stream: bool, tmp_path: Path, make_config: MakeConfig
) -> None:
    held_out = ["\n  ---\nfirst line\nmore", "first line\nagain", "  word " * 20, "日本" * 30, "unasked for " * 40]
    config = make_config(
        "jsonl", streaming=stream, validation_paths=[str(write_jsonl(tmp_path / "held out.jsonl", held_out))]
    )
    validation = readers(config)[1]
    validation.read(3, range(3))
    before = json.dumps(validation.state_dict())
    found = beginnings(validation, load_tokenizer(config, "c.yaml"), 3)
    assert found[:2] == ["first line", ("  word " * 20)[:40].rpartition(" ")[0]]
    assert len(found) == 3 and "日本".startswith(found[2][:2]) and set(found[2]) == set("日本") and len(found[2]) <= 40
    assert json.dumps(validation.state_dict()) == before


def test_extent(make_config: MakeConfig, texts: list[str]) -> None:
    config = make_config("jsonl")
    train, validation = readers(config)
    assert train.extent is not None and validation.extent is not None
    assert train.extent[0] + validation.extent[0] == len(texts)
    encode = load_tokenizer(config, "c.yaml").encode
    assert train.extent[1] + validation.extent[1] == sum(len(encode(text)) + 1 for text in texts)
    assert readers(make_config("jsonl", streaming=True))[0].extent is None
