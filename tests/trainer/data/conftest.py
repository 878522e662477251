"""A small made-up corpus, in every format that a source reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
from corpora import made_up, write_jsonl, write_parquet, write_texts

from trainer.config.schema import DataConfig, TokenizerConfig


@pytest.fixture
def texts() -> list[str]:
    return made_up(90)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the datasets library prepares out of the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub cache")


@pytest.fixture
def make_config(tmp_path: Path, texts: list[str], hub_cache: None) -> Callable[..., DataConfig]:
    """A function from a source, and changes to the config, to the config of ``texts`` written for that source."""

    def make(source: str, **changes: object) -> DataConfig:
        root = tmp_path / "corpus" / source
        if source == "text":
            paths = [str(write_texts(root, texts))]
        elif source == "jsonl":
            paths = [
                str(write_jsonl(root / name, part)) for name, part in (("a.jsonl", texts[:40]), ("b.jsonl", texts[40:]))
            ]
        elif source == "parquet":
            paths = [
                str(write_parquet(root / name, part))
                for name, part in (("a.parquet", texts[:40]), ("b.parquet", texts[40:]))
            ]
        elif source == "hub":
            for number, part in enumerate((texts[:40], texts[40:])):
                write_parquet(root / "data" / f"train-{number:05d}-of-00002.parquet", part)
            write_parquet(root / "data" / "test-00000-of-00001.parquet", made_up(9, seed=1))
            paths = [str(root)]
        else:
            paths = []
        config = DataConfig(
            source=source,
            paths=paths,
            validation_fraction=0.2,
            sequence_length=16,
            cache_dir=str(tmp_path / "cache"),
            tokenizer=TokenizerConfig(vocab_size=300),
        )
        for name, value in changes.items():
            assert hasattr(config, name), name
            setattr(config, name, value)
        return config

    return make
