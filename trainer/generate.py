"""Text from a trained model."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor


class Tokenizer(Protocol):
    """What sampling needs of a tokenizer."""

    end_of_document: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def sample(
    model: Callable[[Tensor, Tensor], Tensor],
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

    The whole text, or its last ``sequence_length`` tokens, is run again for each new token: there is no key/value
    cache. What a prompt becomes depends on the seed and its place in the list, not on the other prompts.

    Args:
        model: logits (B, S, V) of tokens (B, S) at positions (B, S).
        prompts: an empty one starts a document.
        temperature: 0 takes the likeliest token; 1 samples from the model's own distribution.
        top_p: sample from the likeliest tokens that together have this probability, in (0, 1].

    Returns:
        Each prompt with its continuation.
    """
    rows = [tokenizer.encode(prompt) or [tokenizer.end_of_document] for prompt in prompts]
    for _ in _extended(model, tokenizer, rows, max_new_tokens, sequence_length, temperature, top_p, seed, device):
        pass
    return [_text(tokenizer, row, prompt) for row, prompt in zip(rows, prompts, strict=True)]


def stream(
    model: Callable[[Tensor, Tensor], Tensor],
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
    rows = [tokenizer.encode(prompt) or [tokenizer.end_of_document]]
    shown = _text(tokenizer, rows[0], prompt)
    yield shown
    for _ in _extended(model, tokenizer, rows, max_new_tokens, sequence_length, temperature, top_p, seed, device):
        text = _text(tokenizer, rows[0], prompt).rstrip("\ufffd")
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    yield _text(tokenizer, rows[0], prompt)[len(shown) :]


@torch.inference_mode()
def _extended(
    model: Callable[[Tensor, Tensor], Tensor],
    tokenizer: Tokenizer,
    rows: list[list[int]],
    max_new_tokens: int,
    sequence_length: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: torch.device | str,
) -> Iterator[None]:
    """Extend each of the rows, in place, by a token a time; comes back after each round."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(rows))]
    running = set(range(len(rows)))
    for _ in range(max_new_tokens):
        for group in _same_length(rows, running, sequence_length):
            tokens_BS = torch.tensor([rows[index][-sequence_length:] for index in group], device=device)
            positions_BS = torch.arange(tokens_BS.shape[1], device=device).expand_as(tokens_BS)
            # Sampled on the CPU, so that a seed means the same on every device.
            logits_BV = model(tokens_BS, positions_BS)[:, -1].float().cpu()
            for index, logits_V in zip(group, logits_BV, strict=True):
                logits_V = logits_V[: tokenizer.vocab_size]  # a model may have more rows than there are tokens
                token = _choose(logits_V, temperature, top_p, generators[index])
                if token == tokenizer.end_of_document:
                    running.discard(index)
                else:
                    rows[index].append(token)
        yield


def _text(tokenizer: Tokenizer, row: list[int], prompt: str) -> str:
    """The token that an empty prompt stands for is no text."""
    return tokenizer.decode(row if prompt else row[1:])


def _same_length(rows: list[list[int]], running: set[int], sequence_length: int) -> list[list[int]]:
    """Rows that can run together without padding, which an expert with limited capacity would see."""
    groups: dict[int, list[int]] = {}
    for index in sorted(running):
        groups.setdefault(min(len(rows[index]), sequence_length), []).append(index)
    return list(groups.values())


def _choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V, tokens_V = (logits_V / temperature).softmax(-1).sort(descending=True, stable=True)
    # Keep a token if those before it have not reached top_p yet: the likeliest always stays.
    kept_V = probabilities_V.cumsum(-1) - probabilities_V < top_p
    choice = torch.multinomial(probabilities_V * kept_V, 1, generator=generator)
    return int(tokens_V[choice])
