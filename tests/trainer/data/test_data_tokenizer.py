"""Tokenizer: lossless, deterministic, trained on training documents only, cached; and what its mistakes say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from corpora import write_jsonl
from tokenizers import models, processors

from backends.errors import UserError
from trainer.config.schema import DataConfig
from trainer.data import Tokenizer, check_vocabulary, load_tokenizer
from trainer.data import tokenizer as module
from trainer.data.tokenizer import saved_tokenizer

MakeConfig = Callable[..., DataConfig]


def test_trained_tokenizer_is_lossless(make_config: MakeConfig) -> None:
    tokenizer = load_tokenizer(make_config("jsonl"), "c.yaml")
    for text in (
        "",
        "the quick brown fox",
        "  \t\n\nnew\r\nlines ",
        "日本 😀 Möbius\x00",
        "<|endoftext|> is only text",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.end_of_document not in tokenizer.encode(text)
    texts = ["the fox", "", "a dog"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.decode([tokenizer.end_of_document]) == "<|endoftext|>"
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("the quick brown fox")) < len("the quick brown fox")


def test_training_is_deterministic(tmp_path: Path, make_config: MakeConfig) -> None:
    """Within a process; test_processes_that_open_the_same_data_agree does it across them."""
    prints = {load_tokenizer(make_config("jsonl", cache_dir=f"{tmp_path}/{n}"), "c.yaml").fingerprint for n in range(8)}
    assert len(prints) == 1


def test_training_is_cached(make_config: MakeConfig, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    train = module._train

    def counted(documents: object, config: DataConfig, where: str) -> object:
        trained.append(config.tokenizer.vocab_size)
        return train(documents, config, where)

    monkeypatch.setattr(module, "_train", counted)
    config = make_config("jsonl")
    first, second = load_tokenizer(config, "c.yaml"), load_tokenizer(config, "c.yaml")
    assert first.fingerprint == second.fingerprint and trained == [300]
    config.tokenizer.vocab_size = 280
    assert load_tokenizer(config, "c.yaml").vocab_size == 280 and trained == [300, 280]
    config.tokenizer.end_of_document = "<end>"
    assert load_tokenizer(config, "c.yaml").decode([0]) == "<end>" and trained == [300, 280, 280]
    texts[0] += " and another sentence"
    load_tokenizer(make_config("jsonl"), "c.yaml")
    assert trained == [300, 280, 280, 300]


def test_held_out_documents_do_not_train(tmp_path: Path, make_config: MakeConfig) -> None:
    # Of these lines the fifth is held out (see test_held_out_depends_on_the_name_alone for how names hash).
    lines = ["aaaa bbbb"] * 11
    lines[4] = "zqzqzqzq " * 50
    path = write_jsonl(tmp_path / "data.jsonl", lines)
    config = make_config("jsonl", paths=[str(path)], validation_fraction=0.1)
    tokenizer = load_tokenizer(config, "c.yaml")
    assert len(tokenizer.encode("zqzqzqzq")) == 8
    assert len(tokenizer.encode("aaaa")) < 4


def test_only_the_first_characters_train(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ["aaaa bbbb"] * 20 + ["zqzqzqzq " * 10 + "xwxwxwxw " * 50])
    config = make_config("jsonl", paths=[str(path)], validation_paths=[str(write_jsonl(tmp_path / "v.jsonl", ["v"]))])
    monkeypatch.setattr(module, "TRAINING_CHARACTERS", 9 * 20)
    assert len(load_tokenizer(config, "c.yaml").encode("zqzqzqzq")) == 8
    monkeypatch.setattr(module, "TRAINING_CHARACTERS", 9 * 20 + 9 * 10)
    tokenizer = load_tokenizer(config, "c.yaml")
    assert len(tokenizer.encode("zqzqzqzq")) < 8 and len(tokenizer.encode("xwxwxwxw")) == 8  # cut inside the document


def test_saved_tokenizer_loads_as_the_same(tmp_path: Path, make_config: MakeConfig) -> None:
    tokenizer = load_tokenizer(make_config("jsonl"), "c.yaml")
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer.json"]
    config = make_config("jsonl")
    config.tokenizer.path = str(tmp_path / "run" / "tokenizer.json")
    again = load_tokenizer(config, "c.yaml")
    assert again.fingerprint == tokenizer.fingerprint
    config.tokenizer.end_of_document = "a"
    assert load_tokenizer(config, "c.yaml").fingerprint != tokenizer.fingerprint


def user_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """A word-level tokenizer with everything in it that must not reach the training data."""
    inner = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, "a": 3, "b": 900}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    inner.enable_truncation(3)
    inner.enable_padding(length=5)
    inner.save(str(path))
    return inner


def test_users_tokenizer(tmp_path: Path, make_config: MakeConfig) -> None:
    inner = user_tokenizer(tmp_path / "tokenizer.json")
    assert inner.encode("a b a b").ids == [0, 3, 1, 0, 0]
    config = make_config("jsonl")
    config.tokenizer.path, config.tokenizer.end_of_document = str(tmp_path / "tokenizer.json"), "</s>"
    tokenizer = load_tokenizer(config, "c.yaml")
    assert tokenizer.encode("a b a b a</s>b") == [3, 900, 3, 900, 2]
    assert tokenizer.encode_batch(["a", "b b b b"]) == [[3], [900] * 4]
    assert tokenizer.end_of_document == 1
    assert tokenizer.vocab_size == 901  # ids may have gaps: what matters is the largest


def refused(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(config, "c.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_named(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config("jsonl")
    path = tmp_path / "tokenizer.json"
    config.tokenizer.path = str(path)
    assert refused(config).startswith(f"c.yaml: data.tokenizer.path: no file '{path}'; give a tokenizer.json")
    for broken in ("{", json.dumps({"model": 1}), ""):
        path.write_text(broken)
        assert refused(config).startswith(f"c.yaml: data.tokenizer.path: '{path}' is not a valid tokenizer.json (")
    user_tokenizer(path)
    assert refused(config) == (
        f"c.yaml: data.tokenizer.end_of_document: '{path}' has no token '<|endoftext|>'; "
        "set it to one of its special tokens (<s>, </s>)"
    )
    config = make_config("jsonl")
    config.tokenizer.vocab_size = 256
    assert refused(config).startswith("c.yaml: data.tokenizer.vocab_size: is 256; set it to at least 257")
    config.tokenizer.vocab_size, config.tokenizer.end_of_document = 257, ""
    assert refused(config).startswith("c.yaml: data.tokenizer.end_of_document: is empty; ")
    alone = write_jsonl(tmp_path / "alone.jsonl", ["text"])
    config = make_config("jsonl", paths=[str(alone)], validation_fraction=1 - 1e-9)
    assert refused(config).startswith("c.yaml: data.paths: hold fewer than two documents, one to train on and")


def test_vocabulary_must_fit_the_model(make_config: MakeConfig) -> None:
    tokenizer: Tokenizer = load_tokenizer(make_config("jsonl"), "c.yaml")
    check_vocabulary(tokenizer, 300, "c.yaml")
    check_vocabulary(tokenizer, 512, "c.yaml")
    with pytest.raises(UserError) as caught:
        check_vocabulary(tokenizer, 299, "c.yaml")
    assert str(caught.value).startswith(
        "c.yaml: model.vocab_size: is 299, but the tokenizer has 300 entries; raise it to at least 300"
    )


def test_a_saved_tokenizer_that_is_gone_or_damaged(tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "tokenizer.json"
    remedy = "copy it from another checkpoint of the same run"
    with pytest.raises(UserError, match=f"^{path}: is missing; {remedy}$"):
        saved_tokenizer(path, "<end>")
    original = load_tokenizer(make_config("jsonl"), "c.yaml")
    original.save(path)
    assert saved_tokenizer(path, "<|endoftext|>").fingerprint == original.fingerprint
    with pytest.raises(UserError, match=f"^{path}: is damaged; {remedy}$"):
        saved_tokenizer(path, "<end>")
    path.write_text("{")
    with pytest.raises(UserError, match=f"^{path}: is damaged; {remedy}$"):
        saved_tokenizer(path, "<|endoftext|>")
