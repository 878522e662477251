"""Whole models on the simulated NPU: DeepSeek-V3 (MLA, multi-token prediction) and gpt-oss (GQA, window, sinks).

First on torch's fake tensors, where every operator only says shapes and dtypes, by torch_npu's own rules; then with
values, next to the CPU.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from backends.cpu import CpuOperations
from tests.ascend.executor import HostExecutor
from trainer.config.load import load_config
from trainer.model import Cache, MoETransformer, Share, materialize

FAMILIES = ("deepseek-v3", "gpt-oss")
SERVED = {  # the operators of torch_npu that a step of each has to have called, forward and backward
    "deepseek-v3": {"npu_fusion_attention", "npu_fusion_attention_grad", "npu_swiglu", "npu_swiglu_backward"},
    "gpt-oss": set(),  # its attention has sinks and its SwiGLU is clamped
}
BOTH = {"npu_grouped_matmul", "npu_moe_token_permute", "npu_moe_token_permute_grad_v2", "npu_rms_norm"}
BOTH |= {"npu_rms_norm_backward", "npu_rotary_mul"}


def batch(vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions, documents and labels of two packed sequences of 24."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (2, 25), generator=draw)
    documents = torch.zeros(2, 24, dtype=torch.int64)
    documents[0, 9:], documents[1, 20:] = 1, 1
    positions = torch.arange(24).expand(2, -1).clone()
    positions[0, 9:] -= 9
    positions[1, 20:] -= 20
    labels = tokens[:, 1:].clone()
    labels[0, 8] = -100
    return tokens[:, :-1], positions, documents, labels


def built(family: str, ops, device, dtype: torch.dtype, *overrides: str) -> MoETransformer:
    config = load_config(f"configs/models/tiny/{family}.yaml", list(overrides)).model
    model = MoETransformer(config, ops, device="meta", dtype=dtype)
    materialize(model, 0, device)
    return model


def stepped(model: MoETransformer, device) -> tuple[float, dict[str, Tensor]]:
    """The loss and every gradient, on the CPU."""
    given = [x.to(device) for x in batch(model.config.vocab_size)]
    loss = model(*given)
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


# gpt-oss's attention with documents asks for values, to skip what no query sees: fakes have none.
@pytest.mark.parametrize("family, documents", [("deepseek-v3", False), ("deepseek-v3", True), ("gpt-oss", False)])
def test_fake_tensors_reach_every_weight(npu, family, documents):
    with FakeTensorMode():
        config = load_config(f"configs/models/tiny/{family}.yaml", []).model
        model = MoETransformer(config, npu.ops, device=npu.device, dtype=torch.bfloat16)
        tokens, positions, packed, labels = (torch.empty(2, 24, dtype=torch.int64, device=npu.device) for _ in range(4))
        share = Share(48, 2)
        loss = model(tokens, positions, packed if documents else None, labels, share)
        loss.backward()
    assert loss.device == npu.device and loss.shape == ()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.shape, parameter.grad.device) == (parameter.shape, npu.device), name


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_fp32_is_the_cpus(npu, family, recompute):
    cpu = torch.device("cpu")
    loss, gradients = stepped(built(family, CpuOperations(), cpu, torch.float32), cpu)
    with HostExecutor() as executor:
        model = built(family, npu.ops, npu.device, torch.float32)
        model.recompute = recompute
        ours, found = stepped(model, npu.device)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert found.keys() == gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        # Sums of at most a few hundred fp32 terms in another order, over a handful of layers.
        assert (found[name] - gradient).norm() <= 2e-5 * gradient.norm(), name
    assert {name.partition("::")[2] for name in executor.called} >= BOTH | SERVED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_bf16_is_as_near_to_fp32_as_the_cpus(npu, family):
    cpu = torch.device("cpu")
    _, exact = stepped(built(family, CpuOperations(), cpu, torch.float32), cpu)
    _, gradients = stepped(built(family, CpuOperations(), cpu, torch.bfloat16), cpu)
    with HostExecutor():
        _, found = stepped(built(family, npu.ops, npu.device, torch.bfloat16), npu.device)
    for name, gradient in exact.items():
        theirs, ours = ((x[name].float() - gradient).norm() / gradient.norm() for x in (gradients, found))
        # A choice of experts may fall differently in bf16; both are then off by as much.
        assert ours <= 2 * theirs + 2**-7, (name, ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_goes_on_has_the_cpus_logits(npu, family):
    """With a cache: fewer queries than keys, and MLA over compressed vectors, whose heads are slices of a weight."""

    def logits(ops, device) -> list[Tensor]:
        model, cache = built(family, ops, device, torch.float32), Cache(13)
        tokens = batch(model.config.vocab_size)[0].to(device)
        with torch.no_grad():
            return [model(part, cache=cache).cpu() for part in (tokens[:, :9], tokens[:, 9:12], tokens[:, 12:13])]

    expected = logits(CpuOperations(), torch.device("cpu"))
    with HostExecutor():
        found = logits(npu.ops, npu.device)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # logits of order 1, a few layers in fp32
