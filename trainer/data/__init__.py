"""Text to batches: sources, tokenizer, packing, readers, and the bigram baseline."""

from trainer.data.batch import Batch
from trainer.data.beginnings import beginnings
from trainer.data.bigram import bigram_loss
from trainer.data.reader import open_data, open_evaluation
from trainer.data.sequences import SequenceReader
from trainer.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "Batch",
    "SequenceReader",
    "Tokenizer",
    "beginnings",
    "bigram_loss",
    "check_vocabulary",
    "load_tokenizer",
    "open_data",
    "open_evaluation",
]
