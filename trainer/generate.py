"""Text from a trained model."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from trainer.model import Cache


class Model(Protocol):
    """What sampling needs of a model."""

    def __call__(self, tokens_BS: Tensor, *, cache: Cache) -> Tensor:
        """Logits (B, S, V) of tokens that follow those in the cache, which has these as well then."""


class Tokenizer(Protocol):
    """What sampling needs of a tokenizer."""

    end_of_document: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def sample(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    sequence_length: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Continue each prompt until the end of the document or ``max_new_tokens``.

    Each prompt runs by itself, with a cache of its own: what it becomes depends on the seed and its place in the
    list and, bit for bit, not on the other prompts.

    Args:
        prompts: an empty one starts a document.
        sequence_length: tokens that the model sees at most. Behind a longer text the last so many are run again for
            each token, because with every token all of their positions change: that is as slow as without a cache.
        temperature: 0 takes the likeliest token; 1 samples from the model's own distribution.
        top_p: sample from the likeliest tokens that together have this probability, in (0, 1].

    Returns:
        Each prompt with its continuation.
    """
    texts = []
    for index, prompt in enumerate(prompts):
        row = _begin(tokenizer, prompt)
        sampling = max_new_tokens, sequence_length, temperature, top_p, seed + index, device
        for _ in _extend(model, tokenizer, row, *sampling):
            pass
        texts.append(_text(tokenizer, row, prompt))
    return texts


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sequence_length: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[str]:
    """The text that :func:`sample` makes of one prompt, in pieces: the prompt, then what each token adds.

    A character whose bytes are spread over several tokens comes with the last of them.
    """
    row = _begin(tokenizer, prompt)
    shown = _text(tokenizer, row, prompt)
    yield shown
    for _ in _extend(model, tokenizer, row, max_new_tokens, sequence_length, temperature, top_p, seed, device):
        text = _text(tokenizer, row, prompt).rstrip("\ufffd")
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    yield _text(tokenizer, row, prompt)[len(shown) :]


@torch.inference_mode()
def _extend(
    model: Model,
    tokenizer: Tokenizer,
    row: list[int],
    max_new_tokens: int,
    sequence_length: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: torch.device | str,
) -> Iterator[None]:
    """Extend the row, in place, by a token at a time; comes back after each."""
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(sequence_length)
    for _ in range(max_new_tokens):
        if len(row) > sequence_length:
            cache.clear()
        new = row[-sequence_length:][cache.seen :]
        logits_V = model(torch.tensor([new], device=device), cache=cache)[0, -1, : tokenizer.vocab_size]
        # A model may have more rows than there are tokens. Sampled on the CPU: a seed means the same on every device.
        token = _choose(logits_V.float().cpu(), temperature, top_p, generator)
        if token == tokenizer.end_of_document:
            return
        row.append(token)
        yield


def _begin(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return tokenizer.encode(prompt) or [tokenizer.end_of_document]


def _text(tokenizer: Tokenizer, row: list[int], prompt: str) -> str:
    """The token that an empty prompt stands for is no text."""
    return tokenizer.decode(row if prompt else row[1:])


def _choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V, tokens_V = (logits_V / temperature).softmax(-1).sort(descending=True, stable=True)
    # Keep a token if those before it have not reached top_p yet: the likeliest always stays.
    kept_V = probabilities_V.cumsum(-1) - probabilities_V < top_p
    choice = torch.multinomial(probabilities_V * kept_V, 1, generator=generator)
    return int(tokens_V[choice])
