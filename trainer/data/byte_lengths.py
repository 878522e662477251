"""How many bytes of text each token stands for: what a loss is divided by to compare tokenizers."""

import json
import re

import numpy as np
import tokenizers

_BEFORE = "a"  # decoders drop the space of a token that begins a text


def byte_lengths(inner: tokenizers.Tokenizer) -> np.ndarray:
    """(V,) int64: bytes of UTF-8 that each token adds to a text; 0 for special tokens, which no text has.

    Over the tokens of a text they sum to its length, where a tokenizer gives a text back as it was. A space that a
    tokenizer puts in front of a text counts as well.
    """
    added = inner.get_added_tokens_decoder()
    vocabulary = inner.get_vocab(with_added_tokens=True)
    by_bytes = '"ByteLevel"' in json.dumps(json.loads(inner.to_str())["decoder"])
    before = inner.encode(_BEFORE, add_special_tokens=False).ids
    shown = len(inner.decode(before).encode())
    lengths_V = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        if number in added:
            lengths_V[number] = 0 if added[number].special else len(token.encode())
        elif by_bytes:  # one letter for each byte
            lengths_V[number] = len(token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):  # a byte alone is no text to decode
            lengths_V[number] = 1
        else:
            lengths_V[number] = len(inner.decode([*before, number]).encode()) - shown
    return lengths_V
