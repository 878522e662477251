"""The router and the layer around it, against plain readings of DeepSeek-V3 section 2.1.2 that share no code with it.

The reading is scalar numpy in complex128: a complex step, f(x + ih) / h, gives derivatives without cancellation, so
values and gradients are compared to a few hundred roundings of fp64.
"""

import math

import numpy as np
import pytest
import torch
from models_for_tests import (
    OPS,
    assert_close,
    build,
    config,
    context,
    distance,
    fill,
    gradients,
    mla,
    moe,
    some_tokens,
)

from trainer.model import Share
from trainer.model.config import MoEConfig
from trainer.model.moe import MoE
from trainer.model.router import Router

EXACT = 1e-13  # some hundred roundings of 1e-16


# --- the reading --------------------------------------------------------------------------------------------------


def best(values, count):
    """Indices of the largest values."""
    return sorted(range(len(values)), key=lambda i: values[i], reverse=True)[:count]


def read_scores(x, weight, shape):
    """Equation 15, s = sigmoid(u e) for every expert (or the softmax over experts), and the logits u e."""
    logits = [sum(x[h] * weight[e, h] for h in range(len(x))) for e in range(shape.num_experts)]
    if shape.score == "sigmoid":
        return [1 / (1 + np.exp(-z)) for z in logits], logits
    total = sum(np.exp(z) for z in logits)
    return [np.exp(z) / total for z in logits], logits


def read_choice(scores, bias, shape):
    """Equation 16: the top K of score plus bias, within the groups whose two best experts add up to the most."""
    biased = [score.real + b for score, b in zip(scores, bias, strict=True)]
    size = shape.num_experts // shape.num_groups
    worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(shape.num_groups)]
    allowed = [e for g in best(worth, shape.top_groups) for e in range(g * size, (g + 1) * size)]
    return [allowed[i] for i in best([biased[e] for e in allowed], shape.top_k)]


def read_weights(scores, chosen, shape):
    """Equations 13 and 12: the scores themselves, without the bias, normalised over the chosen experts."""
    weights = {e: scores[e] for e in chosen}
    if shape.normalize:
        total = sum(weights.values())
        weights = {e: w / total for e, w in weights.items()}
    return {e: w * shape.scale for e, w in weights.items()}


def read(x, weight, bias, shape, share):
    """Weights per token and expert, tokens per expert, balance loss (equations 17 to 20) and z-loss of a batch."""
    B, T, _ = x.shape
    E = shape.num_experts
    weights = np.zeros((B, T, E), complex)
    count = np.zeros(E, int)
    balance = z_loss = 0
    for b in range(B):
        f, P = np.zeros(E), np.zeros(E, complex)
        for t in range(T):
            scores, logits = read_scores(x[b, t], weight, shape)
            chosen = read_choice(scores, bias, shape)
            for e, w in read_weights(scores, chosen, shape).items():
                weights[b, t, e] = w
                count[e] += 1
                f[e] += E / (shape.top_k * T)
            for e in range(E):
                P[e] += scores[e] / sum(scores) / T
            z_loss += np.log(sum(np.exp(z) for z in logits)) ** 2 / T
        balance += sum(f * P)
    return weights, count, shape.aux_loss * balance / share, shape.z_loss * z_loss / share


# --- the router ---------------------------------------------------------------------------------------------------

ROUTERS = {
    "softmax": MoEConfig(num_experts=6, top_k=2, score="softmax"),
    "softmax-plain": MoEConfig(num_experts=6, top_k=3, score="softmax", normalize=False, scale=1.3),
    "sigmoid": MoEConfig(num_experts=6, top_k=2, score="sigmoid", scale=2.8),
    "sigmoid-bias": MoEConfig(num_experts=7, top_k=3, score="sigmoid", expert_bias=True, scale=2.5),
    "softmax-bias": MoEConfig(num_experts=6, top_k=2, score="softmax", expert_bias=True),
    "groups": MoEConfig(
        num_experts=8, top_k=3, score="sigmoid", expert_bias=True, num_groups=4, top_groups=2, scale=2.5
    ),
    "groups-of-one": MoEConfig(num_experts=5, top_k=2, score="softmax", num_groups=5, top_groups=3),
    "every-expert": MoEConfig(num_experts=4, top_k=4, score="sigmoid", expert_bias=True),
}


def router_of(shape, hidden=5, seed=0):
    router = Router(shape, hidden, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for name, value in router.state_dict().items():
        fill(name, value, generator)
    if router.expert_bias is not None:
        router.expert_bias *= 2  # large enough to change the choice
    return router


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name):
    shape = ROUTERS[name]
    shape.aux_loss, shape.z_loss = 0.7, 0.3
    router, share = router_of(shape), 3.0
    x = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    coefficients = np.random.default_rng(0).normal(size=(2, 5, shape.num_experts))

    routing = router(x, context(sequences=share))
    dense = torch.zeros(10, shape.num_experts, dtype=torch.float64)
    dense = dense.scatter(1, routing.experts_TK, routing.weights_TK).view(2, 5, -1)
    total = (dense * torch.tensor(coefficients)).sum() + routing.losses["aux_loss"] + routing.losses["z_loss"]
    total.backward()

    bias = np.zeros(shape.num_experts) if router.expert_bias is None else router.expert_bias.double().numpy()
    inputs = x.detach().numpy().astype(complex), router.weight.detach().numpy().astype(complex)
    weights, count, balance, z_loss = read(*inputs, bias, shape, share)
    assert routing.experts_TK.shape == (10, shape.top_k)
    assert routing.tokens_E.tolist() == count.tolist()
    assert distance(dense.detach(), torch.tensor(weights.real)) < EXACT
    assert distance(routing.losses["aux_loss"].detach(), torch.tensor(balance.real)) < EXACT
    assert distance(routing.losses["z_loss"].detach(), torch.tensor(z_loss.real)) < EXACT

    step = 1e-30
    for which, grad in enumerate((x.grad, router.weight.grad)):
        expected = np.zeros(inputs[which].shape)
        for index in np.ndindex(expected.shape):
            inputs[which][index] += 1j * step
            weights, _, balance, z_loss = read(*inputs, bias, shape, share)
            expected[index] = ((weights * coefficients).sum() + balance + z_loss).imag / step
            inputs[which][index] = inputs[which][index].real
        assert distance(grad, torch.tensor(expected)) < EXACT


def test_the_bias_decides_the_choice_and_not_the_weight():
    shape = MoEConfig(num_experts=4, top_k=1, score="sigmoid", expert_bias=True, normalize=False)
    router = router_of(shape)
    router.expert_bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0]))
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    routing = router(x, context())
    assert routing.experts_TK.unique().tolist() == [2]
    assert distance(routing.weights_TK[:, 0].detach(), (x[0] @ router.weight[2]).sigmoid().detach()) < EXACT
    assert not router.expert_bias.requires_grad
    assert "expert_bias" in router.state_dict()


def test_groups_close_even_to_the_best_expert():
    """Expert 0 scores highest, but its group holds nothing else and loses to two good experts together."""
    shape = MoEConfig(num_experts=4, top_k=2, score="sigmoid", num_groups=2, top_groups=1)
    router = Router(shape, 1, dtype=torch.float64)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[3.0], [-9.0], [2.0], [1.9]]))
    routing = router(torch.ones(1, 1, 1, dtype=torch.float64), context())
    assert sorted(routing.experts_TK[0].tolist()) == [2, 3]


def test_negative_biased_scores_stay_inside_their_groups():
    """A closed group is worth -inf: with 0, as in early code, it would beat an open group below 0."""
    shape = MoEConfig(num_experts=4, top_k=2, score="sigmoid", num_groups=2, top_groups=1, expert_bias=True)
    router = router_of(shape)
    router.expert_bias.copy_(torch.tensor([-3.0, -3.0, -2.0, -2.0]))
    routing = router(torch.randn(1, 7, 5, dtype=torch.float64), context())
    assert set(routing.experts_TK.flatten().tolist()) == {2, 3}


def test_a_single_expert_keeps_its_score():
    """Normalised, its weight would be 1 whatever the score, and the router would never learn."""
    shape = MoEConfig(num_experts=4, top_k=1, score="sigmoid", normalize=True, scale=2.0)
    router, x = router_of(shape), torch.randn(1, 6, 5, dtype=torch.float64)
    routing = router(x, context())
    assert torch.allclose(routing.weights_TK, 2 * (x[0] @ router.weight.t()).sigmoid().amax(-1, keepdim=True))
    routing.weights_TK.sum().backward()
    assert router.weight.grad.abs().max() > 0


def test_scores_are_fp32_under_bf16():
    router = router_of(ROUTERS["sigmoid"])
    wide = Router(router.config, 5, dtype=torch.float64)
    narrow = router.bfloat16()
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(1, 6, 5).bfloat16()
    routing, expected = narrow(x, context()), wide(x.double(), context())
    assert routing.weights_TK.dtype == torch.float32
    # 1e-6: roundings of fp32; bf16's are 4e-3
    assert distance(routing.weights_TK.sort(-1).values.detach(), expected.weights_TK.sort(-1).values.detach()) < 1e-6


def test_a_perfectly_even_load_has_the_smallest_balance_loss():
    """f and P both 1/E, so that the sum is 1 whatever the number of experts (weight apart)."""
    shape = MoEConfig(num_experts=4, top_k=2, score="softmax", aux_loss=1.0)
    router = Router(shape, 4, dtype=torch.float64)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    tokens = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.float64)
    even = router(tokens[None], context()).losses["aux_loss"]
    uneven = router(tokens[None, :1].expand(1, 4, 4), context()).losses["aux_loss"]
    assert abs(even.item() - 1) < EXACT
    assert uneven > 1.2


# --- the bias update ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.001, 0.25])
def test_balance_moves_each_bias_by_exactly_the_rate(rate):
    router = Router(MoEConfig(num_experts=4, expert_bias=True, expert_bias_rate=rate), 3)
    router.expert_bias.zero_()
    router.balance(torch.tensor([10, 2, 5, 3]))  # mean 5
    step = torch.tensor(rate)
    assert torch.equal(router.expert_bias, torch.stack([-step, step, 0 * step, step]))
    router.balance(torch.tensor([10, 2, 6, 2]))
    assert torch.equal(router.expert_bias, torch.stack([-2 * step, 2 * step, -step, 2 * step]))


def test_balance_compares_large_counts_exactly():
    """One token in 2^40 still tells busy from idle: fp32 would call both the mean."""
    router = Router(MoEConfig(num_experts=2, expert_bias=True, expert_bias_rate=1.0), 3)
    router.expert_bias.zero_()
    router.balance(torch.tensor([2**40 + 1, 2**40 - 1]))
    assert router.expert_bias.tolist() == [-1.0, 1.0]


def test_balance_evens_the_load():
    """A router that prefers some experts is brought to an even load by its bias alone."""
    shape = MoEConfig(num_experts=6, top_k=2, score="sigmoid", expert_bias=True, expert_bias_rate=0.02)
    router = router_of(shape, hidden=8)
    x = torch.randn(1, 600, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.7
    loads = []
    for _ in range(100):
        loads.append(router(x, context()).tokens_E)
        router.balance(loads[-1])
    assert loads[0].max() > 1.6 * 200  # an even load is 200
    assert loads[-1].max() < 1.25 * 200  # a step of 0.02 moves some ten tokens


def test_nothing_but_balance_moves_the_bias():
    model = build(config(moe=moe(aux_loss=0.1, z_loss=0.1)))
    before = {name: layer.router.expert_bias.clone() for name, layer in model.moe_layers()}
    tokens, labels = some_tokens(model.config, 2, 9)
    for _ in range(2):
        model(tokens, labels_BS=labels).backward()
    assert not any(value.grad is not None for value in model.buffers())
    assert all(torch.equal(layer.router.expert_bias, before[name]) for name, layer in model.moe_layers())
    assert all(not name.endswith("expert_bias") for name, _ in model.named_parameters())


# --- the layer, with and without dropping -------------------------------------------------------------------------


def slow_moe(layer, x):
    """A token at a time, an expert at a time; the choice and weights from the router without its capacity."""
    shape = layer.router.config
    B, T, _ = x.shape
    scores = x @ layer.router.weight.t()
    scores = scores.sigmoid() if shape.score == "sigmoid" else scores.softmax(-1)
    bias = [0.0] * shape.num_experts if layer.router.expert_bias is None else layer.router.expert_bias.tolist()
    room = (
        T if shape.capacity_factor is None else math.ceil(T * shape.top_k / shape.num_experts * shape.capacity_factor)
    )
    rows, dropped = [], 0
    for b in range(B):
        weights = [
            read_weights(scores[b, t], read_choice(scores[b, t].detach().numpy().astype(complex), bias, shape), shape)
            for t in range(T)
        ]
        for e in range(shape.num_experts):
            wanted = [t for t in range(T) if e in weights[t]]
            for t in sorted(wanted, key=lambda t: weights[t][e].item(), reverse=True)[room:]:
                del weights[t][e]  # the others keep their weights
                dropped += 1
        for t in range(T):
            y = torch.zeros_like(x[b, t])
            for e, weight in weights[t].items():
                gate, up = (layer.experts.gate_up[e] @ x[b, t]).chunk(2)
                y = y + weight * (layer.experts.down[e] @ (torch.nn.functional.silu(gate) * up))
            if layer.shared is not None:
                gate, up = (layer.shared.gate_up.weight @ x[b, t]).chunk(2)
                y = y + layer.shared.down.weight @ (torch.nn.functional.silu(gate) * up)
            rows.append(y)
    return torch.stack(rows).view_as(x), dropped


@pytest.mark.parametrize("capacity", [None, 0.01, 0.5, 1.0, 1.2, 100.0])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_layer_with_capacity(score, capacity):
    shape = config(moe=moe(score=score, capacity_factor=capacity, num_shared_experts=score == "sigmoid"))
    layer = MoE(shape, OPS, "1", dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for name, value in layer.state_dict().items():
        fill(name, value, generator)
    x = torch.randn(2, 9, shape.hidden_size, dtype=torch.float64, generator=generator).requires_grad_()
    given = context()
    y = layer(x, given)
    expected, dropped = slow_moe(layer, x)
    assert distance(y.detach(), expected.detach()) < EXACT
    if capacity is None or capacity > 2:
        assert dropped == 0
    else:
        assert dropped > 0
    assert given.meters.counts["1"].sum() == 2 * 9 * shape.moe.top_k, "counted before dropping"

    direction = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    names, inputs = zip(("x", x), *layer.named_parameters(), strict=True)
    ours = dict(zip(names, torch.autograd.grad((y * direction).sum(), inputs), strict=True))
    theirs = dict(zip(names, torch.autograd.grad((expected * direction).sum(), inputs), strict=True))
    assert_close(ours, theirs, EXACT)


def test_capacity_is_counted_per_sequence():
    shape = MoEConfig(num_experts=4, top_k=2, score="sigmoid", capacity_factor=0.5)
    router = router_of(shape)
    x = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    together = router(x, context())
    apart = [router(row[None], context()) for row in x]
    assert torch.equal(together.experts_TK, torch.cat([routing.experts_TK for routing in apart]))
    assert torch.equal(together.weights_TK, torch.cat([routing.weights_TK for routing in apart]))
    for row in together.experts_TK.view(3, -1):
        assert row.bincount(minlength=5)[:4].max() == 2  # ceil(8 * 2 / 4 * 0.5)
    dropped = together.experts_TK == 4
    assert dropped.any()
    assert (together.weights_TK[dropped] == 0).all()
    assert (together.weights_TK[~dropped] > 0).all()


# --- micro-batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("capacity", [None, 0.8])
def test_micro_batches_add_up_to_the_whole(sizes, capacity):
    shape = config(attention=mla(), moe=moe(aux_loss=0.3, z_loss=0.2, capacity_factor=capacity), mtp_layers=2)
    tokens, labels = some_tokens(shape, 4, 10)
    labels[0, 2:7] = -100  # unlike numbers of labels in the parts
    share = Share(tokens=int((labels != -100).sum()), sequences=4)

    def run(parts):
        model = build(shape)
        loss = sum(model(tokens[part], labels_BS=labels[part], share=share) for part in parts)
        loss.backward()
        sums, counts = model.meters.take()
        return loss.detach(), gradients(model), sums, counts

    ends = np.cumsum(sizes)
    parts = [slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)]
    loss, grads, sums, counts = run([slice(0, 4)])
    split_loss, split_grads, split_sums, split_counts = run(parts)
    assert distance(split_loss, loss) < EXACT
    assert_close(split_grads, grads, 1e-12)  # three layers of roundings
    assert_close(split_sums, sums, 1e-6)  # meters are fp32
    assert set(sums) == {"lm_loss", "mtp_loss", "aux_loss", "z_loss"}
    assert {name: value.tolist() for name, value in counts.items()} == {
        name: value.tolist() for name, value in split_counts.items()
    }
    assert set(counts) == {"1", "2", "3", "4"}


def test_attached_losses_have_the_gradient_of_the_sum(monkeypatch):
    """Balance and z-loss reach every parameter as if they were added to the loss, with weight 1, exactly once."""
    shape = config(num_layers=4, moe=moe(aux_loss=0.3, z_loss=0.2), mtp_layers=1)
    tokens, labels = some_tokens(shape, 2, 10)
    attached, model = build(shape), build(shape)
    loss = attached(tokens, labels_BS=labels)
    loss.backward()

    losses = []
    for _, layer in model.moe_layers():
        layer.router.register_forward_hook(lambda _module, _input, routing: losses.extend(routing.losses.values()))
    monkeypatch.setattr("trainer.model.moe.attach_loss", lambda x, loss: x)
    plain = model(tokens, labels_BS=labels)
    assert len(losses) == 2 * 4  # three layers and the one of MTP
    (plain + sum(losses)).backward()
    assert torch.equal(loss, plain), "attaching changes no value"
    assert_close(gradients(attached), gradients(model), 1e-12)
