"""What must not change the mathematics: recomputation, the residual's precision, tied embeddings."""

import pytest
import torch
from models_for_tests import OPS, assert_close, build, config, distance, gqa, gradients, mla, moe, some_tokens

from trainer.model import MoETransformer

LOSSES = {"aux_loss": 0.3, "z_loss": 0.2}


# --- activation checkpointing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "more",
    [
        {"attention": gqa(bias=True), "moe": moe(**LOSSES)},
        {"attention": mla(), "moe": moe(**LOSSES, capacity_factor=0.8), "mtp_layers": 2, "residual_fp32": True},
    ],
    ids=["gqa", "mla-capacity-mtp"],
)
def test_recomputation_changes_no_bit(dtype, more):
    shape = config(**more)
    tokens, labels = some_tokens(shape, 3, 10)
    results = []
    for recompute in (False, True):
        model = build(shape, dtype, recompute=recompute)
        loss = model(tokens, labels_BS=labels)
        loss.backward()
        sums, counts = model.meters.take()
        results.append({"loss": loss.detach(), **gradients(model), **sums, **counts})
        assert all(count.sum() == 3 * 10 * shape.moe.top_k for count in counts.values()), "counted once"
    plain, recomputed = results
    assert len(counts) == 2 + shape.mtp_layers
    assert plain.keys() == recomputed.keys()
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []


def test_recomputation_runs_every_layer_again():
    """Otherwise the test above would compare nothing."""
    shape = config(mtp_layers=1)
    model, (tokens, labels) = build(shape, recompute=True), some_tokens(shape, 1, 8)
    calls = []
    for layer in [*model.layers.values(), *model.mtp.values()]:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = model(tokens, labels_BS=labels)
    assert len(calls) == 4
    loss.backward()
    assert len(calls) == 8
    with torch.no_grad():
        model(tokens, labels_BS=labels)
    assert len(calls) == 12


def test_backward_may_pass_twice():
    """As when a pipeline schedule takes the gradients of inputs and of weights apart."""
    shape = config(moe=moe(**LOSSES), mtp_layers=1)
    tokens, labels = some_tokens(shape, 2, 8)
    once, twice = build(shape), build(shape, recompute=True)
    once(tokens, labels_BS=labels).backward()
    loss = twice(tokens, labels_BS=labels)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, grad in gradients(twice).items():
        assert torch.equal(grad, 2 * once.get_parameter(name).grad), name
    _, counts = twice.meters.take()
    assert all(count.sum() == 2 * 8 * shape.moe.top_k for count in counts.values())


def test_gradients_of_activations_and_weights_apart():
    shape = config(moe=moe(**LOSSES))
    tokens, labels = some_tokens(shape, 2, 8)
    model = build(shape, recompute=True)
    stream = []
    model.layers["1"].register_forward_pre_hook(lambda _m, inputs: stream.append(inputs[0]))
    loss = model(tokens, labels_BS=labels)
    weights = dict(model.layers["1"].named_parameters())
    torch.autograd.grad(loss, stream[0], retain_graph=True)
    apart = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
    loss.backward()
    assert_close(dict(zip(weights, apart, strict=True)), gradients(model.layers["1"]), 1e-15)


# --- the residual stream ------------------------------------------------------------------------------------------


def bf16_values(shape):
    """The weights that a bf16 model holds, for the same model in fp64."""
    return build(shape, torch.bfloat16).state_dict()


def test_the_stream_is_fp32_and_the_branches_are_bf16():
    shape = config(residual_fp32=True, mtp_layers=1)
    model, (tokens, labels) = build(shape, torch.bfloat16), some_tokens(shape, 2, 8)
    streams, branches = [], []
    layers = [*model.layers.values(), model.mtp["0"].layer]
    for layer in layers:
        layer.register_forward_hook(lambda _m, inputs, output: streams.extend([inputs[0].dtype, output.dtype]))
        for branch in (layer.attention_norm, layer.attention, layer.ffn_norm, layer.moe or layer.mlp):
            branch.register_forward_hook(lambda _m, _i, output: branches.append(output.dtype))
    model(tokens, labels_BS=labels).backward()
    assert streams == [torch.float32] * 2 * len(layers)
    assert branches == [torch.bfloat16] * 4 * len(layers)
    assert {value.grad.dtype for value in model.parameters()} == {torch.bfloat16}


def test_without_it_the_stream_is_bf16():
    model = build(config(), torch.bfloat16)
    dtypes = []
    for layer in model.layers.values():
        layer.register_forward_hook(lambda _m, _i, output: dtypes.append(output.dtype))
    tokens, _ = some_tokens(model.config, 1, 8)
    assert model(tokens).dtype == torch.float32  # the logits
    assert set(dtypes) == {torch.bfloat16}


def test_an_fp32_residual_is_closer_to_fp64():
    """Ten layers, dense: a token that near ties send to another expert would hide the difference."""
    shape = config(num_layers=10, dense_layers=10)
    tokens, _ = some_tokens(shape, 4, 16)
    weights = bf16_values(shape)

    def logits(dtype, residual_fp32):
        shape.residual_fp32 = residual_fp32
        model = MoETransformer(shape, OPS, device="cpu", dtype=dtype)
        model.load_state_dict(weights)
        with torch.no_grad():
            return model(tokens).double()

    exact = logits(torch.float64, False)
    assert torch.equal(logits(torch.float64, True), exact), "fp64 stays fp64"
    narrow, wide = ((logits(torch.bfloat16, fp32) - exact).square().mean().sqrt() for fp32 in (False, True))
    assert wide < 0.8 * narrow, (wide, narrow)
    assert wide < 0.05 * exact.std()


# --- tied embeddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtp_layers", [0, 1])
def test_the_gradient_of_a_tied_embedding_is_the_sum_of_both_uses(mtp_layers):
    tied = build(config(tie_embeddings=True, mtp_layers=mtp_layers))
    untied = build(config(mtp_layers=mtp_layers))
    assert tied.head.weight is tied.embed.weight
    assert "head.weight" not in dict(tied.named_parameters())
    untied.load_state_dict(tied.state_dict())
    tokens, labels = some_tokens(tied.config, 2, 9)
    losses = [model(tokens, labels_BS=labels) for model in (tied, untied)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    expected = gradients(untied)
    for use in ("embed.weight", "head.weight"):
        assert distance(expected[use], gradients(tied)["embed.weight"]) > 0.1, "each use alone is not enough"
    expected["embed.weight"] += expected.pop("head.weight")
    assert_close(gradients(tied), expected, 1e-13)  # one addition
