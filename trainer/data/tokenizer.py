"""The tokenizer: a user's `tokenizer.json`, or a byte-level BPE trained on the training documents and cached."""

import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from backends.errors import UserError
from trainer.config.schema import DataConfig
from trainer.data.byte_lengths import byte_lengths
from trainer.data.cache import build_once, cache_folder
from trainer.data.documents import Documents, fingerprint
from trainer.data.formats import first_line
from trainer.data.sources import require_documents, training_documents

# A BPE trained on more text than this hardly changes, and its trainer keeps every distinct word in memory.
TRAINING_CHARACTERS = 50_000_000
_BYTES = 256

logger = logging.getLogger(__name__)


class Tokenizer:
    """Text to token ids and back.

    Nothing is added around a text, and a special token's spelling inside one is encoded as plain text: text cannot
    close its document (except under a vocabulary that lists the token as an ordinary word as well).

    Args:
        inner: a tokenizer of the `tokenizers` library, taken over.
        end_of_document: the token, which must be in its vocabulary, that closes a document.
    """

    def __init__(self, inner: tokenizers.Tokenizer, end_of_document: str) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        closing = inner.token_to_id(end_of_document)
        assert closing is not None, "load_tokenizer checks it"
        self._inner = inner
        self.end_of_document: int = closing
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        canonical = json.dumps(json.loads(inner.to_str()), sort_keys=True)
        self.fingerprint: str = fingerprint(canonical, end_of_document)

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without `end_of_document`."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without `end_of_document`; texts are shared among the processor's cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._inner.decode(ids, skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        """See :func:`trainer.data.byte_lengths.byte_lengths`."""
        return byte_lengths(self._inner)

    def save(self, path: str | os.PathLike) -> None:
        """Write a tokenizer.json, at once or not at all; folders are made."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        try:
            self._inner.save(str(partial))
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def load_tokenizer(config: DataConfig, where: str) -> Tokenizer:
    """The tokenizer that ``config.tokenizer`` asks for.

    With ``path`` null, a byte-level BPE of at most ``vocab_size`` entries (fewer if the text has too few pairs to
    merge) is trained on the first 50 million characters of the training documents. Training is deterministic, and
    its result is kept in ``config.cache_dir`` under a fingerprint of the documents and settings.

    Args:
        config: the `data` section.
        where: the config file, for messages.

    Raises:
        UserError: for a tokenizer.json that is missing, broken or lacks ``end_of_document``; for a vocabulary too
            small for bytes; for documents that cannot be read.
    """
    wanted = config.tokenizer
    if wanted.path is not None:
        return _from_file(Path(wanted.path).expanduser(), wanted.end_of_document, where)
    if wanted.vocab_size <= _BYTES:
        raise UserError(
            f"{where}: data.tokenizer.vocab_size: is {wanted.vocab_size}; set it to at least {_BYTES + 1}, for every "
            "byte and the end of a document"
        )
    if not wanted.end_of_document:
        raise UserError(f"{where}: data.tokenizer.end_of_document: is empty; use for instance <|endoftext|>")
    documents = training_documents(config, where)
    settings = (wanted.vocab_size, wanted.end_of_document, TRAINING_CHARACTERS, tokenizers.__version__)
    folder = cache_folder(config.cache_dir, "tokenizers", fingerprint("bpe 1", documents.identity(), settings))

    def build(partial: Path) -> None:
        _train(documents, config, where).save(str(partial / "tokenizer.json"))

    build_once(folder, build, where)
    return _from_file(folder / "tokenizer.json", wanted.end_of_document, where)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int, where: str) -> None:
    """Raise UserError if the tokenizer makes ids that a model of ``model_vocab_size`` entries has no row for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"{where}: model.vocab_size: is {model_vocab_size}, but the tokenizer has {tokenizer.vocab_size} entries; "
            f"raise it to at least {tokenizer.vocab_size}, or use a smaller tokenizer"
        )


def saved_tokenizer(path: Path, end_of_document: str) -> Tokenizer:
    """The tokenizer that a checkpoint keeps. Raises UserError if it is missing or damaged."""
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
        whole = inner.token_to_id(end_of_document) is not None
    except Exception:  # the library raises bare Exception
        whole = False
    if not whole:
        problem = "is damaged" if path.is_file() else "is missing"
        raise UserError(f"{path}: {problem}; copy it from another checkpoint of the same run")
    return Tokenizer(inner, end_of_document)


def _from_file(path: Path, end_of_document: str, where: str) -> Tokenizer:
    if not path.is_file():
        raise UserError(
            f"{where}: data.tokenizer.path: no file '{path}'; give a tokenizer.json, or null to train a tokenizer"
        )
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{where}: data.tokenizer.path: '{path}' is not a valid tokenizer.json ({first_line(error)}); save it "
            "again with the tokenizers library, or use null to train a tokenizer"
        ) from error
    if inner.token_to_id(end_of_document) is None:
        special = [token.content for token in inner.get_added_tokens_decoder().values()]
        listed = f"one of its special tokens ({', '.join(special[:8])})" if special else "a token that it has"
        raise UserError(
            f"{where}: data.tokenizer.end_of_document: '{path}' has no token {end_of_document!r}; set it to {listed}"
        )
    return Tokenizer(inner, end_of_document)


def _train(documents: Documents, config: DataConfig, where: str) -> tokenizers.Tokenizer:
    logger.info("training a tokenizer of %d entries ...", config.tokenizer.vocab_size)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.tokenizer.vocab_size,
        special_tokens=[config.tokenizer.end_of_document],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = 0

    def texts() -> Iterator[str]:
        nonlocal seen
        characters = 0
        for document in documents.open():
            seen += 1
            characters += len(document.text)
            yield document.text[: len(document.text) - max(0, characters - TRAINING_CHARACTERS)]
            if characters >= TRAINING_CHARACTERS:
                return

    inner.train_from_iterator(texts(), trainer=trainer)
    require_documents(seen, False, config, where)
    return inner
