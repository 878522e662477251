"""Bytes of tokens sum to the bytes of the text."""

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from trainer.data.tokenizer import Tokenizer

TEXTS = [
    "def f(x):\n    return x\n",
    "Ein Möbiusband, 莫比乌斯带 ∞ 🎗",
    "  spaces   and\ttabs",
    "<|end|> spelled out",
    "",
]


def byte_level() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    inner.train_from_iterator(TEXTS * 5, trainer=trainer)
    return inner


def byte_fallback() -> tokenizers.Tokenizer:
    """As SentencePiece's: pieces with a sign for the space, and bytes for what no piece has."""
    pieces = ["<unk>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "d", "e", "f", "x", "ö", "▁s", "莫"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<|end|>"])
    return inner


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_they_sum_to_the_bytes_of_the_text(make):
    tokenizer = Tokenizer(make(), "<|end|>")
    lengths_V = tokenizer.byte_lengths()
    assert lengths_V.shape == (tokenizer.vocab_size,) and lengths_V[tokenizer.end_of_document] == 0
    for text in TEXTS:
        assert lengths_V[tokenizer.encode(text)].sum() == len(text.encode()), text


def test_a_token_that_was_added_stands_for_its_own_letters():
    inner = byte_level()
    inner.add_tokens(["Möbius"])
    tokenizer = Tokenizer(inner, "<|end|>")
    assert tokenizer.byte_lengths()[tokenizer.encode("Möbius")].tolist() == [7]
