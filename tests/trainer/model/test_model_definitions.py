"""Families that transformers has no class for, against a plain fp64 reading of their public definitions.

Ling-lite and Ling-plus: inclusionAI's modeling_bailing_moe; Ling 2.0: modeling_bailing_moe_v2; TeleChat2-39B-A12B: the
table in Tele-AI's repository and its MindFormers configuration. The reading works on one position, one head and one
expert at a time and takes nothing from the model but its weights.
"""

import math

import pytest
import torch
from models_for_tests import assert_close, build, config, distance, gqa, gradients, moe, some_tokens
from torch import Tensor

from trainer.model import ModelConfig, MoETransformer
from trainer.model.config import RopeConfig

EXACT = 1e-13  # roundings of fp64, as in test_model_transformers

SOFTMAX = {"score": "softmax", "expert_bias": False, "scale": 1.0, "num_experts": 6}
FAMILIES = {
    "ling-lite": config(
        attention=gqa(qk_norm=False),
        rope=RopeConfig(theta=6e5),
        moe=moe(**SOFTMAX, num_shared_experts=2),
        dense_layers=0,
        normalize_head=True,
    ),
    "ling-2": config(
        attention=gqa(head_dim=8),
        rope=RopeConfig(theta=6e5, fraction=0.5),
        moe=moe(num_experts=12, num_groups=4, top_groups=2, top_k=4, scale=2.5),
    ),
    "telechat2": config(
        attention=gqa(num_heads=3, num_kv_heads=3, qk_norm=False),
        moe=moe(**SOFTMAX, num_shared_experts=0),
        dense_layers=0,
        norm_eps=1e-5,
    ),
}


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def rotated(x: Tensor, position: int, theta: float, dims: int) -> Tensor:
    """Dimension r turns with dimension r + dims/2."""
    values = list(x)
    for r in range(dims // 2):
        angle = position * theta ** (-2 * r / dims)
        a, b = x[r], x[r + dims // 2]
        values[r] = a * math.cos(angle) - b * math.sin(angle)
        values[r + dims // 2] = b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(values)


def attention(weights: dict[str, Tensor], at: str, rows: list[Tensor], shape: ModelConfig) -> list[Tensor]:
    heads, size, eps = shape.attention.num_heads, shape.attention.head_dim, shape.norm_eps
    dims = round(size * shape.rope.fraction)

    def head(kind: str, position: int, number: int) -> Tensor:
        x = weights[f"{at}.{kind}.weight"][number * size : (number + 1) * size] @ rows[position]
        if kind != "v" and shape.attention.qk_norm:
            x = norm(x, weights[f"{at}.{kind}_norm.weight"], eps)
        return x if kind == "v" else rotated(x, position, shape.rope.theta, dims)

    results = []
    for position in range(len(rows)):
        mixed = []
        for number in range(heads):
            of = number * shape.attention.num_kv_heads // heads
            query = head("q", position, number)
            scores = [query @ head("k", other, of) / math.sqrt(size) for other in range(position + 1)]
            shares = torch.stack(scores).softmax(0)
            mixed.append(sum(share * head("v", other, of) for other, share in enumerate(shares)))
        results.append(weights[f"{at}.out.weight"] @ torch.cat(mixed))
    return results


def swiglu(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate / (1 + (-gate).exp()) * up)


def chosen(scores: Tensor, shape: ModelConfig, bias: Tensor | None) -> list[int]:
    """The experts of a token, best first: among the groups whose two best experts add up to most."""
    moe = shape.moe
    worth = scores if bias is None else scores + bias
    size = moe.num_experts // moe.num_groups
    groups = [sorted(worth[g * size : (g + 1) * size].tolist())[-2:] for g in range(moe.num_groups)]
    open_groups = sorted(range(moe.num_groups), key=lambda g: -sum(groups[g]))[: moe.top_groups]
    allowed = [e for g in open_groups for e in range(g * size, (g + 1) * size)]
    return sorted(allowed, key=lambda e: -worth[e].item())[: moe.top_k]


def mixture(weights: dict[str, Tensor], at: str, x: Tensor, shape: ModelConfig) -> Tensor:
    logits = weights[f"{at}.router.weight"] @ x
    scores = logits.exp() / logits.exp().sum() if shape.moe.score == "softmax" else 1 / (1 + (-logits).exp())
    experts = chosen(scores.detach(), shape, weights.get(f"{at}.router.expert_bias"))
    total = sum(scores[e] for e in experts)
    result = torch.zeros_like(x)
    for e in experts:
        output = swiglu(weights[f"{at}.experts.gate_up"][e], weights[f"{at}.experts.down"][e], x)
        result = result + shape.moe.scale * scores[e] / total * output
    if shape.moe.num_shared_experts:
        result = result + swiglu(weights[f"{at}.shared.gate_up.weight"], weights[f"{at}.shared.down.weight"], x)
    return result


def read(model: MoETransformer, tokens: Tensor) -> Tensor:
    """Logits (S, V) of one sequence."""
    shape, weights = model.config, model.state_dict(keep_vars=True)
    rows = [weights["embed.weight"][token] for token in tokens]
    for layer in range(shape.num_layers):
        at = f"layers.{layer}"
        normed = [norm(x, weights[f"{at}.attention_norm.weight"], shape.norm_eps) for x in rows]
        rows = [x + y for x, y in zip(rows, attention(weights, f"{at}.attention", normed, shape), strict=True)]
        for position, x in enumerate(rows):
            h = norm(x, weights[f"{at}.ffn_norm.weight"], shape.norm_eps)
            if layer < shape.dense_layers:
                y = swiglu(weights[f"{at}.mlp.gate_up.weight"], weights[f"{at}.mlp.down.weight"], h)
            else:
                y = mixture(weights, f"{at}.moe", h, shape)
            rows[position] = x + y
    head = weights["head.weight"]
    if shape.normalize_head:
        head = head / (head.detach().square().sum(0, keepdim=True).sqrt() + 1e-7)
    return torch.stack([head @ norm(x, weights["norm.weight"], shape.norm_eps) for x in rows])


def tables(rope: RopeConfig, dims: int, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64: the model's own are fp32, and compared in test_model_rope."""
    angles = positions_BS[..., None].double() * rope.theta ** (-torch.arange(0, dims, 2).double() / dims)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("name", FAMILIES)
def test_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.model.model.rotations", tables)
    model = build(FAMILIES[name])
    tokens, labels = some_tokens(model.config, 2, 7)
    expected = torch.stack([read(model, row) for row in tokens])
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    expected_loss.backward()
    theirs = gradients(model)
    model.zero_grad()
    with torch.no_grad():
        assert distance(model(tokens), expected.detach()) <= EXACT
    loss = model(tokens, labels_BS=labels)
    loss.backward()
    assert distance(loss.detach(), expected_loss.detach()) <= EXACT
    assert_close(gradients(model), theirs, EXACT)
