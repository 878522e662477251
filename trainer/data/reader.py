"""Training and validation sequences of a run."""

from itertools import islice

from backends.errors import UserError
from trainer.config.schema import DataConfig
from trainer.data.documents import Documents
from trainer.data.packed import PackedReader
from trainer.data.packing import packed_corpus
from trainer.data.sequences import Order, SequenceReader
from trainer.data.sources import (
    all_documents,
    name_of,
    require_documents,
    too_short,
    training_documents,
    validation_documents,
)
from trainer.data.streaming import StreamReader
from trainer.data.tokenizer import Tokenizer


def open_data(config: DataConfig, tokenizer: Tokenizer, seed: int, where: str) -> tuple[SequenceReader, SequenceReader]:
    """The (training, validation) readers of a run. Every rank calls this; one of them tokenizes.

    Training sequences wrap into further epochs and are shuffled if ``config.shuffle``; validation sequences keep their
    order and end.

    Args:
        config: the `data` section.
        tokenizer: see :func:`trainer.data.tokenizer.load_tokenizer`.
        seed: seed of the shuffling, any integer.
        where: the config file, for messages.

    Raises:
        UserError: for documents that cannot be read, a cache that cannot be written, or a half of the corpus that
            does not fill one sequence (when streaming, the last at the first read).
    """
    _require_length(config, where)
    halves = training_documents(config, where), validation_documents(config, where)
    shuffle_seed = seed if config.shuffle else None
    return (
        _reader(halves[0], shuffle_seed, False, config, tokenizer, where),
        _reader(halves[1], None, True, config, tokenizer, where),
    )


def open_evaluation(config: DataConfig, tokenizer: Tokenizer, everything: bool, where: str) -> SequenceReader:
    """Sequences to evaluate on alone, in their order and once.

    Args:
        everything: read all documents of ``data.paths``; or else the validation documents, as in training.

    Raises:
        UserError: as :func:`open_data`.
    """
    _require_length(config, where)
    if everything:
        return _reader(all_documents(config, where), None, None, config, tokenizer, where)
    return _reader(validation_documents(config, where), None, True, config, tokenizer, where)


def _require_length(config: DataConfig, where: str) -> None:
    if config.sequence_length < 1:
        raise UserError(f"{where}: data.sequence_length: is {config.sequence_length}; it must be at least 1")


def _reader(
    documents: Documents, seed: int | None, held_out: bool | None, config: DataConfig, tokenizer: Tokenizer, where: str
) -> SequenceReader:
    """Sequences of the validation documents, the training documents (``held_out`` False) or of all (None)."""
    length = config.sequence_length
    if config.streaming:
        require_documents(len(list(islice(documents.open(), 1))), held_out, config, where)
        order = Order(True, tokenizer.fingerprint, documents.signature(), length, seed)
        return StreamReader(documents, tokenizer, order, held_out, config, where)
    corpus = packed_corpus(documents, tokenizer, config, where)
    require_documents(len(corpus.starts_D), held_out, config, where)
    if not corpus.num_sequences(length):
        what = f"{len(corpus.tokens_N)} {name_of(held_out)} tokens"
        raise too_short(what, held_out, config, where)
    order = Order(False, tokenizer.fingerprint, corpus.fingerprint, length, seed)
    return PackedReader(corpus, order, held_out is False, config.reset_at_documents, where)
