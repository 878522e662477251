"""How held-out documents begin: prompts that suit whatever text a model was trained on."""

import numpy as np

from trainer.data.sequences import SequenceReader
from trainer.data.tokenizer import Tokenizer

_SEQUENCES = 64  # looked at
_TOKENS = 64  # of a document
_CHARACTERS = 40  # of a line


def beginnings(validation: SequenceReader, tokenizer: Tokenizer, count: int) -> list[str]:
    """The beginning of the first line with a letter in it, of the first ``count`` documents that differ in it.

    Fewer if the first sequences hold fewer. Where the reader stands does not change.
    """
    tokens_N = validation.tokens(0, _SEQUENCES)[:, :-1].reshape(-1)  # not shuffled, hence one after another
    ends = np.flatnonzero(tokens_N == tokenizer.end_of_document)
    found: list[str] = []
    for start, end in zip([0, *(ends + 1)], [*ends, len(tokens_N)], strict=True):
        text = tokenizer.decode(tokens_N[start : min(end, start + _TOKENS)].tolist())
        line = next((line for line in text.splitlines() if any(map(str.isalpha, line))), "")
        if len(line) > _CHARACTERS:
            line = line[:_CHARACTERS].rpartition(" ")[0] or line[:_CHARACTERS]
        line = line.rstrip("\ufffd")  # a character whose last bytes were cut off
        if line and line not in found:
            found.append(line)
        if len(found) == count:
            break
    return found
