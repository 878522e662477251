"""The tokenized corpus: one memory-mapped array of all documents, each closed by `end_of_document`."""

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers

from backends.errors import UserError
from trainer.config.schema import DataConfig
from trainer.data.cache import build_once, cache_folder
from trainer.data.documents import Documents, fingerprint
from trainer.data.tokenizer import Tokenizer

_GROUP_DOCUMENTS = 256  # encoded together: enough to keep the processor's cores busy
_GROUP_CHARACTERS = 4_000_000

logger = logging.getLogger(__name__)


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Token ids of each text in turn, closed by `end_of_document`; 1-D uint32."""
    waiting = iter(texts)
    while True:
        group, characters = [], 0
        for text in islice(waiting, _GROUP_DOCUMENTS):
            group.append(text)
            characters += len(text)
            if characters >= _GROUP_CHARACTERS:
                break
        if not group:
            return
        for ids in tokenizer.encode_batch(group):
            ids.append(tokenizer.end_of_document)
            yield np.array(ids, dtype=np.uint32)


class PackedCorpus:
    """A folder made by :func:`packed_corpus`, mapped into memory.

    Attributes:
        tokens_N: (N,) uint16 or uint32, all documents one after another.
        starts_D: (D,) int64, where each document begins.
        fingerprint: stands for the content, wherever and whenever it was built.
    """

    def __init__(self, folder: Path, where: str) -> None:
        try:
            about = json.loads((folder / "about.json").read_text())
            self.tokens_N = np.zeros(0, np.uint16)
            if about["tokens"]:  # an empty file cannot be mapped
                self.tokens_N = np.memmap(folder / "tokens.bin", dtype=about["dtype"], mode="r")
            self.starts_D = np.load(folder / "starts.npy", mmap_mode="r")
            whole = (len(self.tokens_N), len(self.starts_D)) == (about["tokens"], about["documents"])
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            raise UserError(f"{where}: data.cache_dir: '{folder}' is damaged; delete it, and it is made again")
        self.fingerprint: str = about["fingerprint"]

    def num_sequences(self, sequence_length: int) -> int:
        """Sequences of ``sequence_length`` tokens that have a next token to predict at their end."""
        return max(0, (len(self.tokens_N) - 1) // sequence_length)

    def rows(self, sequences_B: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document numbers, int64 of shape (B, sequence_length + 1), of the sequences numbered so."""
        places_BT = sequences_B[:, None] * sequence_length + np.arange(sequence_length + 1)
        documents_BT = np.searchsorted(self.starts_D, places_BT, side="right") - 1
        return self.tokens_N[places_BT].astype(np.int64), documents_BT


def packed_corpus(documents: Documents, tokenizer: Tokenizer, config: DataConfig, where: str) -> PackedCorpus:
    """Tokenize ``documents`` into ``config.cache_dir``, or find them there.

    Raises UserError if a document cannot be read or the cache cannot be written.
    """
    key = fingerprint("packed 2", documents.identity(), tokenizer.fingerprint, tokenizers.__version__)
    folder = cache_folder(config.cache_dir, "tokens", key)
    return PackedCorpus(build_once(folder, lambda partial: _write(partial, documents, tokenizer), where), where)


def _write(folder: Path, documents: Documents, tokenizer: Tokenizer) -> None:
    logger.info("tokenizing the %s documents ...", documents.half.partition(" ")[0] or "given")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    content = hashlib.blake2b(digest_size=16)
    starts, length = array("q"), 0
    with (folder / "tokens.bin").open("wb") as out:
        for tokens in encoded((document.text for document in documents.open()), tokenizer):
            starts.append(length)
            length += len(tokens)
            raw = tokens.astype(dtype).tobytes()
            content.update(len(tokens).to_bytes(8, "little") + raw)
            out.write(raw)
    np.save(folder / "starts.npy", np.frombuffer(starts, dtype=np.int64) if starts else np.zeros(0, np.int64))
    about = {"dtype": dtype.str, "tokens": length, "documents": len(starts), "fingerprint": content.hexdigest()}
    (folder / "about.json").write_text(json.dumps(about))
