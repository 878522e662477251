"""Sources: what is read, in which order, what is held out, where a walk resumes, and what every mistake says."""

import json
import os
import sysconfig
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from corpora import made_up, write_jsonl, write_parquet, write_texts

from backends.errors import UserError
from trainer.config.schema import DataConfig
from trainer.data.documents import Documents, bound, hash_of
from trainer.data.sources import training_documents, validation_documents

FORMATS = ["text", "jsonl", "parquet", "hub"]
MakeConfig = Callable[..., DataConfig]


def everything(config: DataConfig) -> Documents:
    return Documents(training_documents(config, "c.yaml").source)


def read(config: DataConfig) -> list[str]:
    return [document.text for document in everything(config).open()]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", FORMATS)
def test_reads_every_document_in_order(source: str, streaming: bool, make_config: MakeConfig, texts: list[str]) -> None:
    assert read(make_config(source, streaming=streaming)) == texts


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", FORMATS)
def test_halves_are_disjoint_and_complete(
    source: str, streaming: bool, make_config: MakeConfig, texts: list[str]
) -> None:
    config = make_config(source, streaming=streaming)
    training = list(training_documents(config, "c.yaml").open())
    validation = list(validation_documents(config, "c.yaml").open())
    assert sorted(training + validation) == sorted(everything(config).open())
    assert 5 <= len(validation) <= 35
    assert [document.text for document in validation] == [t for t in texts if t in {d.text for d in validation}]


def test_held_out_depends_on_the_name_alone() -> None:
    names = [f"data.jsonl:{number}" for number in range(2000)]
    held_out = [name for name in names if hash_of(name) < bound(names, 0.1)]
    assert 150 < len(held_out) < 250
    # Written down once: a change here moves training documents into the evaluation of a resumed run.
    assert held_out[:4] == ["data.jsonl:5", "data.jsonl:12", "data.jsonl:39", "data.jsonl:42"]
    assert set(held_out) < {name for name in names if hash_of(name) < bound(names, 0.2)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("fraction", "held_out"), [(1e-9, 1), (1 - 1e-9, 2)])
def test_of_a_few_documents_one_is_held_out_and_one_is_not(
    fraction: float, held_out: int, streaming: bool, tmp_path: Path, make_config: MakeConfig
) -> None:
    path = write_texts(tmp_path / "few", ["one", "two", "three"])
    config = make_config("text", paths=[str(path)], validation_fraction=fraction, streaming=streaming)
    training = {document.text for document in training_documents(config, "c.yaml").open()}
    validation = {document.text for document in validation_documents(config, "c.yaml").open()}
    assert (len(training), len(validation)) == (3 - held_out, held_out)
    assert training | validation == {"one", "two", "three"}


def test_a_fraction_that_gives_both_halves_something_is_left_alone() -> None:
    names = [str(number) for number in range(50)]
    hashes = sorted(map(hash_of, names))
    for index in (1, 25, 49):
        wanted = (hashes[index - 1] + hashes[index]) / 2**65
        assert sum(value < bound(names, wanted) for value in hashes) == index
    assert bound([], 0.5) == bound(["a"], 0.5) == 2**63


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", [*FORMATS, "stdlib"])
def test_resumes_between_any_two_documents(source: str, streaming: bool, make_config: MakeConfig) -> None:
    documents = training_documents(make_config(source, streaming=streaming), "c.yaml")
    expected = list(islice(documents.open(), 90))
    for stop in [0, 1, 6, 7, 8, 31, 32, 33, 40, len(expected) - 1, len(expected)]:
        stream = documents.open()
        assert len(list(islice(stream, stop))) == stop
        state = json.loads(json.dumps(stream.state_dict()))
        # Resuming, and saving at once, loses nothing either.
        state = json.loads(json.dumps(documents.open(state).state_dict()))
        resumed = documents.open(state)
        following, rest = expected[stop : stop + 3], expected[stop + 3 :]
        assert list(islice(resumed, len(following))) == following
        assert list(islice(documents.open(resumed.state_dict()), len(rest))) == rest


def test_resume_reads_nothing_twice(make_config: MakeConfig) -> None:
    config = make_config("jsonl")
    documents = everything(config)
    stream = documents.open()
    list(islice(stream, 45))
    state = stream.state_dict()
    # What lies behind is never looked at again: it may even be gone.
    Path(config.paths[0]).write_text("no JSON")
    second = Path(config.paths[1])
    lines = second.read_bytes().splitlines(keepends=True)
    second.write_bytes(b"".join(b"x" * (len(line) - 1) + b"\n" if n < 5 else line for n, line in enumerate(lines)))
    assert len(list(documents.open(state))) == 45


def test_stdlib_is_read_where_it_lies(make_config: MakeConfig) -> None:
    documents = list(everything(make_config("stdlib")).open())
    names = [document.name for document in documents]
    assert {"json/decoder.py", "asyncio/tasks.py", "argparse.py"} <= set(names)
    assert names == sorted(names, key=lambda name: Path(name).parts) and len(names) > 300
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(Path(name).parts)]
    file = Path(sysconfig.get_paths()["stdlib"], "argparse.py")
    assert documents[names.index("argparse.py")].text == file.read_bytes().decode()


def test_paths_are_files_folders_and_globs(tmp_path: Path, make_config: MakeConfig) -> None:
    write_jsonl(tmp_path / "d" / "b.jsonl", ["b"])
    write_jsonl(tmp_path / "d" / "a.jsonl", ["a"])
    write_jsonl(tmp_path / "d" / "deep" / "c.jsonl", ["c"])
    write_jsonl(tmp_path / "d" / ".hidden" / "e.jsonl", ["no"])
    (tmp_path / "d" / "notes.txt").write_text("no")
    config = make_config("jsonl", paths=[f"{tmp_path}/d"])
    assert [tuple(d) for d in everything(config).open()] == [
        ("a.jsonl:1", "a"),
        ("b.jsonl:1", "b"),
        ("deep/c.jsonl:1", "c"),
    ]
    config.paths = [f"{tmp_path}/d/**/*.jsonl"]
    assert sorted(read(config)) == ["a", "b", "c"]
    config.paths = [f"{tmp_path}/d/b.jsonl", f"{tmp_path}/d/*.jsonl"]
    assert read(config) == ["b", "a"]  # each file once


def test_validation_paths(tmp_path: Path, make_config: MakeConfig, texts: list[str]) -> None:
    held_out = write_jsonl(tmp_path / "held out.jsonl", made_up(3, seed=5))
    config = make_config("jsonl", validation_paths=[str(held_out)])
    assert [d.text for d in training_documents(config, "c.yaml").open()] == texts
    assert [d.text for d in validation_documents(config, "c.yaml").open()] == made_up(3, seed=5)
    config = make_config("hub", validation_paths=["test"])
    assert [d.text for d in validation_documents(config, "c.yaml").open()] == made_up(9, seed=1)


@pytest.mark.parametrize("source", FORMATS)
def test_fingerprints_follow_the_content(source: str, make_config: MakeConfig, texts: list[str]) -> None:
    config = make_config(source)
    before = everything(config)
    assert before.identity() == everything(config).identity()
    assert before.identity() != training_documents(config, "c.yaml").identity()
    texts[3] += " more"
    after = everything(make_config(source))
    assert before.identity() != after.identity()
    assert before.signature() != after.signature()


def test_signature_is_the_same_for_a_copy(tmp_path: Path, make_config: MakeConfig, texts: list[str]) -> None:
    original = everything(make_config("text"))
    copy = everything(make_config("text", paths=[str(write_texts(tmp_path / "copy", texts))]))
    assert original.signature() == copy.signature()
    assert original.identity() != copy.identity()


def refused(config: DataConfig) -> str:
    """What reading both halves of ``config`` says; a UserError of one line."""
    with pytest.raises(UserError) as caught:
        list(training_documents(config, "c.yaml").open())
        list(validation_documents(config, "c.yaml").open())
    message = str(caught.value)
    assert "\n" not in message and ";" in message
    return message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "half', "not valid JSON (Unterminated string starting at, column 10)"),
        (b'{"text": "\xff"}', "not valid JSON (byte 10 is not UTF-8)"),
        (b'["text"]', "not a JSON object but list"),
        (b'{"body": "x", "id": 1}', "no field 'text' (fields: body, id); set data.text_field"),
        (b'{"text": null}', "field 'text' holds NoneType, not a string"),
        (b'{"text": "a\\ud800"}', "field 'text' holds half of a surrogate pair"),
        (b"[" * 100_000, "not valid JSON (nested too deeply)"),
    ],
)
def test_broken_jsonl_line_is_named(line: bytes, says: str, tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "data.jsonl"
    good = b'{"text": "fine"}\n'
    path.write_bytes(good * 15 + b"\n" + line + b"\n" + good)  # line 16 is blank, which is no mistake
    message = refused(make_config("jsonl", paths=[str(path)]))
    assert message.startswith(f"{path}:17: {says}") and message.endswith("fix or remove the line")


def test_jsonl_mark_escapes_and_missing_newline_are_fine(tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\ud83d\\ude00"}\r\n{"text": ""}\n{"text": "b"}')
    assert read(make_config("jsonl", paths=[str(path)])) == ["a😀", "b"]


def test_parquet_mistakes_name_the_file(tmp_path: Path, make_config: MakeConfig) -> None:
    path = write_parquet(tmp_path / "x.parquet", ["a", "b"])
    message = refused(make_config("parquet", paths=[str(path)], text_field="body"))
    assert message == f"{path}: no column 'body' (columns: n, text); set data.text_field to one of them"
    message = refused(make_config("parquet", paths=[str(path)], text_field="n"))
    assert message.startswith(f"{path}: row 0: column 'n' holds int, not a string; set data.text_field")
    path.write_bytes(b"PAR1 nothing of the kind")
    message = refused(make_config("parquet", paths=[str(path)]))
    assert message.startswith(f"{path}: not a readable Parquet file (")


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_missing_and_empty_files_are_named(source: str, tmp_path: Path, make_config: MakeConfig) -> None:
    missing = f"{tmp_path}/foo/*.{source}"
    message = refused(make_config(source, paths=[missing]))
    assert message == f"c.yaml: data.paths: no file matches '{missing}'; give an existing file, folder or glob"
    message = refused(make_config(source, validation_paths=[f"{tmp_path}/none"]))
    assert message.startswith(f"c.yaml: data.validation_paths: no file matches '{tmp_path}/none'")
    (tmp_path / f"empty.{source}").touch()
    message = refused(make_config(source, paths=[f"{tmp_path}/empty.{source}"]))
    assert message == f"c.yaml: data.paths: '{tmp_path}/empty.{source}' is empty; give a file with text in it"
    assert refused(make_config(source, paths=[])).startswith("c.yaml: data.paths: is empty; ")


def test_other_files_that_cannot_be_used(tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\xe9".encode("latin-1"))
    assert refused(make_config("text", paths=[str(path)])).startswith(f"{path}: byte 3 is not UTF-8; convert")
    (tmp_path / "folder").mkdir()
    message = refused(make_config("jsonl", paths=[f"{tmp_path}/folder"]))
    assert message.startswith(f"c.yaml: data.paths: no .jsonl file in folder '{tmp_path}/folder'; ")
    config = make_config("text", validation_fraction=0.5)
    documents = training_documents(config, "c.yaml")
    gone = next(path for path in sorted(Path(config.paths[0]).iterdir()) if hash_of(path.name) >= 2**63)
    gone.unlink()
    with pytest.raises(UserError, match=f"c.yaml: data.paths: cannot read '{gone}' .No such file.*; check the file"):
        list(documents.open())


def test_settings_that_cannot_work(make_config: MakeConfig) -> None:
    config = make_config("jsonl")
    config.validation_paths = [config.paths[1]]
    assert refused(config).startswith(f"c.yaml: data.validation_paths: '{config.paths[1]}' is in data.paths too; ")
    for fraction in (0.0, 1.0, -1.0):
        message = refused(make_config("jsonl", validation_fraction=fraction))
        assert message.startswith(f"c.yaml: data.validation_fraction: is {fraction:g}; set it between 0 and 1")
    message = refused(make_config("stdlib", paths=["x.jsonl"]))
    assert message.startswith("c.yaml: data.paths: is set, but data.source is stdlib; set data.source")
    message = refused(make_config("stdlib", validation_paths=["x.jsonl"]))
    assert message.startswith("c.yaml: data.validation_paths: the stdlib source has no files to name; ")
    assert refused(make_config("tape", paths=["x"])).startswith("c.yaml: data.source: 'tape' is unknown; use stdlib")


def test_hub_mistakes(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    message = refused(make_config("hub", text_field="body"))
    assert message.startswith("c.yaml: data.text_field: the hub dataset '") and "(columns: n, text); " in message
    message = refused(make_config("hub", text_field="n"))
    assert message.startswith("c.yaml: data.text_field: 'n' holds int, not a string, in row 0 of the hub dataset")
    for streaming in (False, True):
        message = refused(make_config("hub", hub_split="dev", streaming=streaming))
        assert message.startswith("c.yaml: data.hub_split: cannot read split 'dev' of the hub dataset '"), message
        assert "train" in message and message.endswith("choose another split or check the connection")
    message = refused(make_config("hub", hub_subset="de"))
    assert message.startswith("c.yaml: data.hub_subset: cannot open the hub dataset '")
    message = refused(make_config("hub", paths=["one", "two"]))
    assert message == "c.yaml: data.paths: lists 2 names; a hub source takes exactly one"
    message = refused(make_config("hub", validation_paths=["train"]))
    assert message.startswith("c.yaml: data.validation_paths: 'train' is the training split too; ")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused(make_config("hub", paths=["nobody/nothing-of-that-name"]))
    assert message.startswith("c.yaml: data.paths: cannot open the hub dataset 'nobody/nothing-of-that-name' (")
    assert message.endswith("check the name and the connection, or use local files")


def test_hub_connection_that_breaks_while_reading(make_config: MakeConfig) -> None:
    config = make_config("hub", streaming=True)
    documents = everything(config)
    for path in Path(config.paths[0], "data").glob("train-00001*"):
        os.truncate(path, 40)
    with pytest.raises(UserError, match=r"^c.yaml: data.paths: reading row 40 of the hub dataset '.*; check the conn"):
        list(documents.open())
