"""The tokenized corpus on disk: its content, and many processes that want it at once."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from backends.errors import UserError
from trainer.config.schema import DataConfig
from trainer.data import load_tokenizer, open_data
from trainer.data.cache import build_once
from trainer.data.packing import PackedCorpus, packed_corpus
from trainer.data.sources import training_documents

MakeConfig = Callable[..., DataConfig]


def folder_of(config: DataConfig) -> Path:
    """The only folder of tokens in the cache."""
    (folder,) = (path for path in Path(config.cache_dir, "tokens").iterdir() if path.is_dir())
    return folder


def packed(config: DataConfig) -> PackedCorpus:
    tokenizer = load_tokenizer(config, "c.yaml")
    return packed_corpus(training_documents(config, "c.yaml"), tokenizer, config, "c.yaml")


@pytest.mark.parametrize("group", [1, 5, 256])
def test_corpus_is_every_document_closed(group: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.packing._GROUP_DOCUMENTS", group)
    config = make_config("text")
    corpus, tokenizer = packed(config), load_tokenizer(config, "c.yaml")
    tokens, starts = [], []
    for document in training_documents(config, "c.yaml").open():
        starts.append(len(tokens))
        tokens += [*tokenizer.encode(document.text), tokenizer.end_of_document]
    assert corpus.tokens_N.tolist() == tokens
    assert corpus.starts_D.tolist() == starts
    assert corpus.tokens_N.dtype == np.uint16
    length = 16
    count = corpus.num_sequences(length)
    assert count * length + 1 <= len(tokens) < (count + 1) * length + 1
    rows, numbers = corpus.rows(np.array([count - 1, 0, 3]), length)
    for row, number, i in zip(rows, numbers, [count - 1, 0, 3], strict=True):
        assert row.tolist() == tokens[i * length : i * length + length + 1]
        assert number.tolist() == [sum(s <= p for s in starts) - 1 for p in range(i * length, i * length + length + 1)]


def test_exact_fit_has_no_sequence_too_many() -> None:
    corpus = object.__new__(PackedCorpus)
    for tokens, expected in [(0, 0), (1, 0), (16, 0), (17, 1), (32, 1), (33, 2)]:
        corpus.tokens_N = np.zeros(tokens, np.uint16)
        assert corpus.num_sequences(16) == expected


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, make_config: MakeConfig) -> None:
    import tokenizers

    words = {f"w{number}": number for number in range(70_000)} | {"<|endoftext|>": 70_000}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w69999"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "large.json"))
    config = make_config("jsonl")
    config.tokenizer.path = str(tmp_path / "large.json")
    corpus = packed(config)
    assert corpus.tokens_N.dtype == np.uint32
    assert set(corpus.tokens_N.tolist()) == {69_999, 70_000}


def test_cache_follows_documents_and_tokenizer(make_config: MakeConfig, texts: list[str]) -> None:
    config = make_config("text")
    first = packed(config)
    folder = folder_of(config)
    written = (folder / "tokens.bin").stat().st_mtime_ns
    assert packed(config).fingerprint == first.fingerprint
    assert folder_of(config) == folder and (folder / "tokens.bin").stat().st_mtime_ns == written
    config.sequence_length = 8  # another view of the same tokens
    packed(config)
    assert folder_of(config) == folder
    config.tokenizer.vocab_size = 290
    assert packed(config).fingerprint != first.fingerprint
    texts[5] = "something else"
    assert packed(make_config("text")).fingerprint != first.fingerprint


def test_content_has_one_fingerprint_wherever_it_lies(tmp_path: Path, make_config: MakeConfig) -> None:
    first = packed(make_config("text"))
    config = make_config("text", cache_dir=str(tmp_path / "other cache"))
    copy = shutil.copytree(config.paths[0], tmp_path / "copy")
    for path in copy.iterdir():
        path.touch()
    config.paths = [str(copy)]
    assert packed(config).fingerprint == first.fingerprint


def test_damaged_cache_is_named(make_config: MakeConfig) -> None:
    config = make_config("text")
    packed(config)
    folder = folder_of(config)
    whole = (folder / "tokens.bin").read_bytes()
    for damage in (lambda: (folder / "tokens.bin").write_bytes(whole[:-2]), (folder / "about.json").unlink):
        damage()
        with pytest.raises(UserError, match=f"^c.yaml: data.cache_dir: '{folder}' is damaged; delete it"):
            packed(config)


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "file").touch()
    config = make_config("text", cache_dir=str(tmp_path / "file"))
    with pytest.raises(
        UserError, match="^c.yaml: data.cache_dir: cannot write '.*file/tokenizers' .*; choose a folder"
    ):
        load_tokenizer(config, "c.yaml")


def build_slowly(target: Path, log: Path, seconds: float, together: Barrier) -> None:
    """What one process of the tests below does."""

    def build(folder: Path) -> None:
        with log.open("a") as out:
            out.write(f"{os.getpid()}\n")
        (folder / "one").write_text("1")
        time.sleep(seconds)
        (folder / "two").write_text("2")

    together.wait(60)
    found = build_once(target, build, "c.yaml")
    assert sorted(path.name for path in found.iterdir()) == ["one", "two"], list(found.iterdir())


def start(tmp_path: Path, count: int, seconds: float) -> list[BaseProcess]:
    """Forked, not spawned: the processes touch files only, and importing torch would take them seconds each."""
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "cache" / "x", tmp_path / "log", seconds, context.Barrier(count))
    processes = [context.Process(target=build_slowly, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "waited for too long"
        time.sleep(0.01)


def test_one_of_many_processes_builds(tmp_path: Path) -> None:
    processes = start(tmp_path, 6, 0.5)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len((tmp_path / "log").read_text().split()) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == ["x"]


def test_a_killed_builder_leaves_nothing_behind(tmp_path: Path) -> None:
    (killed,) = start(tmp_path, 1, 60)
    wait_for(lambda: any((tmp_path / "cache").glob("*/one")))
    killed.kill()
    killed.join(60)
    assert not (tmp_path / "cache" / "x").exists()
    build_once(tmp_path / "cache" / "x", lambda folder: (folder / "new").touch(), "c.yaml")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == ["x"]
    assert [path.name for path in (tmp_path / "cache" / "x").iterdir()] == ["new"]


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise UserError("a broken document")

    with pytest.raises(UserError, match="^a broken document$"):
        build_once(tmp_path / "cache" / "x", build, "c.yaml")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_builder_overtaken_takes_what_is_there(tmp_path: Path) -> None:
    """On a file system whose locks do nothing, two may build; the second to finish must not fail."""

    def build(folder: Path) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "theirs").touch()
        (folder / "ours").touch()

    build_once(tmp_path / "x", build, "c.yaml")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["theirs"]
    assert not list(tmp_path.glob("x.partial*"))


def test_processes_that_open_the_same_data_agree(make_config: MakeConfig) -> None:
    config = make_config("jsonl")
    program = (
        "import json, sys\nfrom trainer.config.schema import DataConfig, TokenizerConfig\n"
        "from trainer.data import load_tokenizer, open_data\n"
        "values = json.loads(sys.argv[1])\n"
        "config = DataConfig(**{**values, 'tokenizer': TokenizerConfig(**values['tokenizer'])})\n"
        "train, validation = open_data(config, load_tokenizer(config, 'c.yaml'), 3, 'c.yaml')\n"
        "print(json.dumps([train.read(8, range(8)).tokens_BS.tolist(), train.state_dict(), validation.state_dict()]))\n"
    )
    values = json.dumps({**vars(config), "tokenizer": vars(config.tokenizer)})
    processes = [
        subprocess.Popen([sys.executable, "-c", program, values], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    config.cache_dir += " of its own"
    train, validation = open_data(config, load_tokenizer(config, "c.yaml"), 3, "c.yaml")
    expected = [train.read(8, range(8)).tokens_BS.tolist(), train.state_dict(), validation.state_dict()]
    assert [json.loads(output) for output in outputs] == [expected] * 2
