"""Made-up texts, and the files they can be written to."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "Möbius",
    "strips",
    "have",
    "only",
    "one",
    "side",
    "def",
    "return",
    "import\n",
    "x",
    "=",
    "1",
]


def made_up(count: int, seed: int = 0, most: int = 60) -> list[str]:
    """``count`` texts of 1 to ``most`` words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, most))) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str], group: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), path, row_group_size=group)
    return path


def write_texts(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text)
    return folder
