"""Multi-token prediction against a loop over positions, and packed documents against the documents alone."""

import numpy as np
import pytest
import torch
from models_for_tests import assert_close, build, config, distance, gqa, gradients, mla, moe, some_tokens

from backends.operations import IGNORED
from trainer.model.config import RopeConfig
from trainer.model.context import Context, Meters, Share
from trainer.model.rope import rotated_dims, rotations

ATTENTIONS = {
    "gqa": (gqa(bias=True), RopeConfig(fraction=1 / 3)),
    "mla": (mla(), RopeConfig(interleaved=True)),
}
EXACT = 1e-13  # roundings of fp64, as in test_model_transformers


def norm(x, module):
    return x / torch.sqrt((x * x).mean() + module.eps) * module.weight


def run_layer(layer, rows, shape):
    """A transformer layer (compared to transformers elsewhere) on one document, a list of vectors."""
    dims = rotated_dims(shape.attention, shape.rope)
    cos, sin = rotations(shape.rope, dims, torch.arange(len(rows))[None])
    context = Context(cos, sin, None, Share(1, 1), Meters(), recording=False)
    return list(layer(torch.stack(rows)[None], context)[0])


def read(model, documents):
    """Section 2.2 for documents of (tokens, labels): sums of -log p of the main model and of each depth.

    Equation 21: h' = M [norm(embedding of token i+k); norm(h of depth k-1)], positions 1 to T-k (the published
    weights put the embedding first and hand over h after its norm). Equation 22: h = TRM(h'). Equation 23: p from
    the shared head. Equation 24: cross entropy with token i+k+1, that is, with the label of position i+k.
    """
    shape = model.config
    depths = [torch.zeros((), dtype=torch.float64) for _ in range(1 + shape.mtp_layers)]

    def cost(h, label):
        logits = model.head.weight @ h
        return logits.exp().sum().log() - logits[label]

    for tokens, labels in documents:
        rows = [model.embed.weight[t] for t in tokens]
        for layer in model.layers.values():
            rows = run_layer(layer, rows, shape)
        rows = [norm(h, model.norm) for h in rows]
        for k in range(1 + shape.mtp_layers):
            if k > 0:
                mtp = model.mtp[str(k - 1)]
                merged = []
                for i in range(len(tokens) - k):
                    embedding = norm(model.embed.weight[tokens[i + k]], mtp.embed_norm)
                    merged.append(mtp.project.weight @ torch.cat([embedding, norm(rows[i], mtp.hidden_norm)]))
                if not merged:
                    break
                rows = [norm(h, mtp.norm) for h in run_layer(mtp.layer, merged, shape)]
            for i in range(len(tokens) - k):
                seen = labels[i : i + k + 1]
                if IGNORED not in seen:
                    depths[k] = depths[k] + cost(rows[i], seen[-1])
    return depths


def pack(documents):
    """One row: tokens, positions from 0 in each document, document numbers, labels."""
    tokens = [t for document, _ in documents for t in document]
    labels = [label for _, document in documents for label in document]
    positions = [i for document, _ in documents for i in range(len(document))]
    numbers = [n for n, (document, _) in enumerate(documents) for _ in document]
    return [torch.tensor([row]) for row in (tokens, positions, numbers, labels)]


def some_documents(shape, lengths, ignored=()):
    rng = np.random.default_rng(0)
    documents = []
    for length in lengths:
        tokens = rng.integers(shape.vocab_size, size=length).tolist()
        documents.append((tokens, [*tokens[1:], IGNORED]))
    for document, position in ignored:
        documents[document][1][position] = IGNORED
    return documents


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("lengths", "ignored"),
    [([9], []), ([9], [(0, 0), (0, 4)]), ([6, 5], []), ([1, 7, 2, 4], [(1, 2), (3, 0)])],
    ids=["one", "ignored-labels", "two-documents", "short-documents"],
)
def test_mtp_is_a_loop_over_positions(attention, depth, lengths, ignored):
    shape, rope = ATTENTIONS[attention]
    shape = config(num_layers=2, attention=shape, rope=rope, mtp_layers=depth, mtp_loss=0.7, moe=moe(num_experts=4))
    documents = some_documents(shape, lengths, ignored)
    tokens, positions, numbers, labels = pack(documents)

    model = build(shape)
    loss = model(tokens, positions, None if len(lengths) == 1 else numbers, labels)
    loss.backward()
    sums, _ = model.meters.take()

    reading = build(shape)
    count = int((labels != IGNORED).sum())
    main, *further = (total / count for total in read(reading, documents))
    expected = main + 0.7 * sum(further) / depth
    expected.backward()
    assert distance(loss.detach(), expected.detach()) < EXACT
    # 1e-6: meters are fp32
    assert distance(sums["lm_loss"], main.detach()) < 1e-6
    assert distance(sums["mtp_loss"], (sum(further) / depth).detach()) < 1e-6
    assert_close(gradients(model), gradients(reading), 1e-12)  # the sum of thirty gradients of opposite signs


def test_mtp_reaches_the_shared_embedding_head_and_the_model():
    shape = config(mtp_layers=1, mtp_loss=1.0)
    tokens, labels = some_tokens(shape, 2, 9)
    grads = []
    for weight in (0.0, 1.0):
        shape.mtp_loss = weight
        model = build(shape)
        model(tokens, labels_BS=labels).backward()
        grads.append(gradients(model))
    for name in ("embed.weight", "head.weight", "norm.weight", "layers.0.attention.q.weight"):
        assert distance(grads[0][name], grads[1][name]) > 0.01
    assert all(grads[0][name].abs().max() == 0 for name in grads[0] if name.startswith("mtp."))
    assert all(grads[1][name].abs().max() > 0 for name in grads[1] if name.startswith("mtp."))


def test_without_labels_mtp_does_not_run():
    shape = config(mtp_layers=1)
    model, (tokens, _) = build(shape), some_tokens(shape, 1, 6)
    model.mtp["0"].register_forward_hook(lambda *_: pytest.fail("MTP only predicts for training"))
    assert model(tokens).shape == (1, 6, shape.vocab_size)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("lengths", [[7, 5], [1, 3, 8, 1], [150, 20]], ids=str)
def test_packed_documents_are_the_documents_alone(attention, lengths):
    """150: longer than one block of the CPU attention."""
    shape, rope = ATTENTIONS[attention]
    shape = config(num_layers=2, attention=shape, rope=rope)
    documents = some_documents(shape, lengths)
    tokens, positions, numbers, _ = pack(documents)
    model = build(shape)
    with torch.no_grad():
        packed = model(tokens, positions, numbers)
        alone = torch.cat([model(torch.tensor([document])) for document, _ in documents], 1)
        assert distance(packed, alone) < EXACT
        assert distance(model(tokens, None, numbers), alone) < 1e-6, "rotations are relative: fp32 angles only differ"
        assert distance(model(tokens, positions), alone) > 0.01, "without document numbers they see each other"


def test_later_tokens_change_nothing():
    shape = config(num_layers=2, attention=mla())
    model, (tokens, _) = build(shape), some_tokens(shape, 1, 12)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % shape.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert distance(after[:, :7], before[:, :7]) < EXACT
    assert distance(after[:, 7:], before[:, 7:]) > 0.01
