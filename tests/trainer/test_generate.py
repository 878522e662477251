"""Sampling: with a model whose next token is known, and with real ones beside themselves without a cache."""

import pytest
import torch

from tests.trainer.model.models_for_tests import build, config, gqa, mla
from trainer.generate import sample, stream
from trainer.model import Cache, MoETransformer


class Letters:
    """a to z are 0 to 25; 26 ends the document; the model has more rows than that."""

    end_of_document = 26
    vocab_size = 27

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token + ord("a")) for token in ids)


class Alphabet:
    """Likes the next letter best, then the one after that; after z the end. Ids over 26 it likes above all."""

    def __init__(self, second: float = -100.0) -> None:
        self.second, self.shapes, self.first_tokens = second, [], []

    def __call__(self, tokens_BS: torch.Tensor, *, cache: Cache) -> torch.Tensor:
        self.shapes.append(tuple(tokens_BS.shape))
        cache.advance(tokens_BS.shape[1])
        assert cache.seen <= cache.length
        self.first_tokens += tokens_BS[:, 0].tolist()
        logits_BSV = torch.full((*tokens_BS.shape, 32), -100.0)
        logits_BSV.scatter_(-1, ((tokens_BS + 2) % 27).unsqueeze(-1), self.second)
        logits_BSV.scatter_(-1, ((tokens_BS + 1) % 27).unsqueeze(-1), 0.0)
        logits_BSV[..., 27:] = 10.0
        return logits_BSV


def run(model, prompts, new_tokens=5, length=100, **settings) -> list[str]:
    return sample(model, Letters(), prompts, new_tokens, length, **settings)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "top_p": 1.0}])
def test_continues_each_prompt(settings):
    assert run(Alphabet(), ["a", "fg", "k"], **settings) == ["abcdef", "fghijkl", "klmnop"]


def test_stops_at_the_end_of_the_document_while_others_go_on():
    assert run(Alphabet(), ["y", "a"], temperature=0) == ["yz", "abcdef"]


def test_stops_running_the_model_when_all_have_ended():
    model = Alphabet()
    run(model, ["y"], new_tokens=50, temperature=0)
    assert len(model.shapes) == 2


def test_an_empty_prompt_begins_a_document_and_shows_no_token_for_it():
    assert run(Alphabet(), [""], new_tokens=3, temperature=0) == ["abc"]


def test_no_new_tokens_gives_the_prompt():
    assert run(Alphabet(), ["abc"], new_tokens=0) == ["abc"]


def test_the_model_sees_at_most_the_last_sequence_length_tokens():
    model = Alphabet()
    assert run(model, ["abcdefgh"], new_tokens=3, length=4, temperature=0) == ["abcdefghijk"]
    assert model.shapes == [(1, 4)] * 3 and model.first_tokens == [4, 5, 6]


def test_each_token_runs_once_and_no_prompt_is_padded():
    model = Alphabet()
    run(model, ["abc", "d"], new_tokens=3, temperature=0)
    assert model.shapes == [(1, 3), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]
    assert model.first_tokens == [0, 3, 4, 3, 4, 5]


def test_the_last_token_that_fits_still_runs_alone():
    model = Alphabet()
    run(model, ["ab"], new_tokens=4, length=4, temperature=0)
    assert model.shapes == [(1, 2), (1, 1), (1, 1), (1, 4)]


def test_seed_decides_and_neighbours_do_not():
    settings = {"new_tokens": 12, "temperature": 1.0, "top_p": 1.0}
    alone = run(Alphabet(second=0.0), ["a"], seed=3, **settings)
    together = run(Alphabet(second=0.0), ["a", "ab", "a"], seed=3, **settings)
    assert together[0] == alone[0] and together == run(Alphabet(second=0.0), ["a", "ab", "a"], seed=3, **settings)
    assert together[2] != together[0]  # the same prompt twice gives two texts
    assert alone != run(Alphabet(second=0.0), ["a"], seed=4, **settings)


def frequencies(**settings) -> float:
    """How often the likelier of two tokens is chosen; their odds are e to 1."""
    texts = run(Alphabet(second=-1.0), ["a"] * 2000, new_tokens=1, **settings)
    return sum(text == "ab" for text in texts) / len(texts)


def test_temperature_shapes_the_distribution():
    assert frequencies(temperature=1.0, top_p=1.0) == pytest.approx(0.731, abs=0.03)
    assert frequencies(temperature=2.0, top_p=1.0) == pytest.approx(0.622, abs=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    assert frequencies(temperature=1.0, top_p=0.73) == 1.0
    assert frequencies(temperature=1.0, top_p=0.74) < 0.8


@pytest.mark.parametrize("prompt", ["a", "", "xyz"])
def test_a_stream_is_the_sample_in_pieces(prompt):
    settings = {"max_new_tokens": 12, "sequence_length": 100, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    model = Alphabet(second=0.0)
    pieces = list(stream(model, Letters(), prompt, **settings))
    assert pieces[0] == prompt and len(pieces) > 3 and max(map(len, pieces[1:])) == 1
    assert "".join(pieces) == sample(Alphabet(second=0.0), Letters(), [prompt], **settings)[0]


def test_a_stream_gives_a_token_before_the_next_is_drawn():
    model = Alphabet()
    pieces = stream(model, Letters(), "a", 5, 100, temperature=0)
    assert [next(pieces), next(pieces)] == ["a", "b"] and len(model.shapes) == 1


class Bytes(Letters):
    """Each token is half of a character of two bytes."""

    def decode(self, ids: list[int]) -> str:
        return b"".join(bytes([0xC3]) if place % 2 == 0 else bytes([0xA9]) for place in range(len(ids))).decode(
            errors="replace"
        )


def test_half_a_character_waits_for_the_other_half():
    pieces = list(stream(Alphabet(), Bytes(), "ab", 5, 100, temperature=0))
    assert [piece for piece in pieces if piece] == ["é", "é", "é", "\ufffd"]


class Endless(Letters):
    """No token ends the document."""

    end_of_document = -1
    vocab_size = 26


REAL = {
    "gqa": config(attention=gqa(sinks=True, window=4, full_every=2)),
    "mla": config(attention=mla()),
}


def greedily(model: MoETransformer, prompt: str, new_tokens: int, length: int) -> str:
    """What the likeliest tokens make of a prompt, all that the model sees run again for each."""
    row = Endless().encode(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            row.append(int(model(torch.tensor([row[-length:]]))[0, -1, :26].argmax()))
    return Endless().decode(row)


@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
@pytest.mark.parametrize("length", [64, 9])  # longer than the text, and shorter
def test_the_cache_changes_no_greedy_text(shape, length):
    model = build(shape, torch.float32)
    prompts = ["moebius", "a", "thequickbrownfox"]
    found = sample(model, Endless(), prompts, 20, length, temperature=0)
    assert found == [greedily(model, prompt, 20, length) for prompt in prompts]
    assert max(len(set(text[-20:])) for text in found) > 3  # some do not only repeat themselves


@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
def test_other_prompts_change_no_bit(shape):
    model = build(shape, torch.float32)

    def seen_with(prompts: list[str]) -> list[torch.Tensor]:
        """The logits of everything that runs for the first prompt."""
        seen: list[list[torch.Tensor]] = []

        def listening(tokens_BS, *, cache):
            if cache.seen == 0:
                seen.append([])
            seen[-1].append(model(tokens_BS, cache=cache))
            return seen[-1][-1]

        sample(listening, Endless(), prompts, 6, 64, temperature=1.0, seed=5)
        return seen[0]

    alone, together = seen_with(["abc"]), seen_with(["abc", "xyzw", "abc"])
    assert len(alone) == len(together) == 6
    assert all(map(torch.equal, alone, together))
