"""Every operation of a model is captured as the model calls it, passes, and fails where it is wrong."""

import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.cpu import CpuOperations
from backends.cuda import CudaOperations
from backends.operations import IGNORED, ExpertOrder, Operations
from parallel import topology
from tests.distributed.ranks import ROOT
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.model import MoETransformer, materialize
from trainer.verify.captured import Call, OrderSpec, Recorder, Spec, capture
from trainer.verify.inputs import DISTRIBUTIONS, inputs
from trainer.verify.ops import Checked, check, report

CPU = torch.device("cpu")
MOST = 2**18
TOKENS = 48


@pytest.fixture(scope="module", autouse=True)
def no_group() -> None:
    """A capture pretends a world of its own. The one that earlier folders share has served."""
    topology.stop()


def config(name: str, *overrides: str) -> Config:
    return load_config(str(ROOT / "configs" / name), list(overrides))


def checked(ops: Operations, name: str, precision: str, tokens: int = TOKENS, *overrides: str) -> list[Checked]:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    calls = capture(config(name, f"train.precision={precision}", *overrides), tokens)
    return check(calls, ops, CPU, dtype, MOST)


@cache
def bf16_calls(name: str) -> dict[Call, int]:
    return capture(config(name, "train.precision=bf16"), TOKENS)


def of(operation: str, ops: Operations, name: str) -> list[Checked]:
    """One operation of a model; the others pass, as another test says."""
    calls = {call: times for call, times in bf16_calls(name).items() if call.operation == operation}
    return check(calls, ops, CPU, torch.bfloat16, MOST)


DEEPSEEK, GPT_OSS = "models/tiny/deepseek-v3.yaml", "models/tiny/gpt-oss.yaml"


@pytest.mark.parametrize("name", ["tiny.yaml", DEEPSEEK, GPT_OSS])
def test_what_is_captured_is_what_a_real_forward_calls(name):
    """On numbers instead of fakes: the same calls, as often, in the same order."""
    small = config(name, "train.micro_batch_size=2", "data.sequence_length=32", "train.global_batch_tokens=64")
    recorder = Recorder(CpuOperations())
    model = MoETransformer(small.model, recorder)
    materialize(model, 0, "cpu")
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    model(tokens, documents_BS=torch.zeros_like(tokens), labels_BS=tokens)
    assert list(capture(small).items()) == list(recorder.calls.items())


def test_the_recorder_has_every_method_and_gives_the_results_of_the_operations():
    recorder = Recorder(CpuOperations())
    for name in Operations.__abstractmethods__:
        assert callable(getattr(recorder, name))
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.equal(recorder.linear(x, weight=weight), x @ weight.T)
    assert list(recorder.calls) == [
        Call("linear", (("x", Spec((3, 4), x.dtype, False)), ("weight", Spec((5, 4), x.dtype, False)), ("bias", None)))
    ]


def test_a_model_of_105b_is_captured_without_its_memory():
    """A few of its layers, which are all alike: 4 of them would take 20 GiB."""
    big = config("models/telechat3-105b.yaml", "model.num_layers=4")
    calls = capture(big, tokens=64)
    experts = [dict(call.arguments)["weight_EOI"].shape for call in calls if call.operation == "grouped_mm"]
    moe = big.model.moe
    held = moe.num_experts // big.parallel.expert
    assert experts[0] == (held, 2 * moe.expert_hidden_size, big.model.hidden_size)
    assert dict(next(c for c in calls if c.operation == "attention").arguments)["q_BSND"].shape[:2] == (1, 64)


def test_with_expert_parallelism_the_exchange_s_operations_are_captured():
    calls = capture(config(DEEPSEEK, "parallel.expert=2"), tokens=64)
    assert "take_rows" in {call.operation for call in calls}
    (weight,) = {dict(c.arguments)["weight_EOI"].shape[0] for c in calls if c.operation == "grouped_mm"}
    assert weight == config(DEEPSEEK).model.moe.num_experts // 2


@pytest.mark.parametrize("name", ["tiny.yaml", DEEPSEEK, GPT_OSS])
@pytest.mark.parametrize("ops", [CpuOperations(), CudaOperations()], ids=["cpu", "cuda"])
def test_all_operations_of_a_model_pass_in_bf16(ops, name):
    found = checked(ops, name, "bf16")
    assert not [failure for one in found for failure in one.failures()]
    assert not any(one.skipped for one in found)


def test_all_operations_of_a_model_pass_in_fp32():
    found = checked(CpuOperations(), DEEPSEEK, "fp32", TOKENS, "parallel.expert=2")
    assert not [failure for one in found for failure in one.failures()]
    assert "take_rows" in {one.call.operation for one in found}


class OtherEps(CpuOperations):
    def rms_norm(self, x, weight, eps):
        return super().rms_norm(x, weight, 2 * eps)


class HalvesSwapped(CpuOperations):
    def swiglu(self, gate_up, limit=None):
        return super().swiglu(torch.cat(gate_up.chunk(2, -1)[::-1], -1), limit)


class OtherPairs(CpuOperations):
    def rotary(self, x_BSND, cos_BSR, sin_BSR, interleaved):
        return super().rotary(x_BSND, cos_BSR, sin_BSR, not interleaved)


class ScaleOff(CpuOperations):
    """By 2 %: five roundings of bf16."""

    def unpermute(self, y_PH, order, weights_TK):
        return super().unpermute(y_PH, order, weights_TK * 1.02)


class NarrowSum(CpuOperations):
    """Adds up in bf16, four terms at a time."""

    def linear(self, x, weight, bias=None):
        total = None
        for part, its in zip(x.split(4, -1), weight.split(4, -1), strict=True):
            term = super().linear(part, its)
            total = term if total is None else total + term
        return total if bias is None else total + bias


class Unstable(CpuOperations):
    def sort_by_expert(self, experts_TK, num_experts, dropping=True):
        found = super().sort_by_expert(experts_TK.flip(0), num_experts, dropping)
        rows = experts_TK.numel() - experts_TK.shape[1]
        flipped = rows - found.order_P // found.top_k * found.top_k + found.order_P % found.top_k
        return ExpertOrder(flipped, found.inverse_TK.flip(0), found.counts_E)


class LeaksDocuments(CpuOperations):
    def attention(self, q_BSND, k_BLMD, v_BLMW, scale, documents_BL=None, window=0, sinks_N=None):
        return super().attention(q_BSND, k_BLMD, v_BLMW, scale, None, window, sinks_N)


class LastExpertOnly(CpuOperations):
    """The weight gradient of the first expert is lost."""

    def grouped_mm(self, x_TI, weight_EOI, counts_E):
        lost = torch.cat([weight_EOI[:1].detach(), weight_EOI[1:]])
        return super().grouped_mm(x_TI, lost, counts_E)


class CountsIgnored(CpuOperations):
    def linear_cross_entropy(self, hidden_TH, weight_VH, labels_T):
        return super().linear_cross_entropy(hidden_TH, weight_VH, labels_T.masked_fill(labels_T == IGNORED, 0))


class NoGradientOfRepeats(CpuOperations):
    """A token's gradient is that of its first choice only."""

    def permute(self, x_TH, order):
        rows = super().permute(x_TH, order)
        first = (order.order_P % order.top_k == 0)[:, None]
        return torch.where(first, rows, rows.detach())


FAULTS = {
    OtherEps: ("rms_norm", "output"),
    HalvesSwapped: ("swiglu", "output"),
    OtherPairs: ("rotary", "output"),
    ScaleOff: ("unpermute", "output"),
    NarrowSum: ("linear", "output"),
    Unstable: ("sort_by_expert", "order_P"),
    LeaksDocuments: ("attention", "output"),
    LastExpertOnly: ("grouped_mm", "gradient of weight_EOI"),
    CountsIgnored: ("linear_cross_entropy", "output 0"),
    NoGradientOfRepeats: ("permute", "gradient of x_TH"),
}


@pytest.mark.parametrize("faulty", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_operation_is_found_and_named(faulty):
    operation, what = FAULTS[faulty]
    made = report(of(operation, faulty(), DEEPSEEK), {})
    assert made.verdict == "different"
    assert made.summary.startswith(f"{operation}: first {operation} (") and f"inputs: {what}: " in made.summary
    assert made.exit_code == 1


class NoSinks(CpuOperations):
    def attention(self, q_BSND, k_BLMD, v_BLMW, scale, documents_BL=None, window=0, sinks_N=None):
        return super().attention(q_BSND, k_BLMD, v_BLMW, scale, documents_BL, window, sinks_N * 0)


class NoLimit(CpuOperations):
    def swiglu(self, gate_up, limit=None):
        return super().swiglu(gate_up, limit if limit is None else 2 * limit)


@pytest.mark.parametrize("faulty, operation", [(NoSinks, "attention"), (NoLimit, "swiglu")])
def test_what_only_one_family_has_is_checked_with_its_config(faulty, operation):
    assert report(of(operation, faulty(), GPT_OSS), {}).summary.startswith(f"{operation}: first")


def test_eps_shows_where_inputs_are_near_zero_and_hides_where_they_are_large():
    found = of("rms_norm", OtherEps(), DEEPSEEK)[0]
    failed = {distribution for distribution, _ in found.failures()}
    assert "near zero" in failed and "large" not in failed


def test_every_integer_input_is_valid():
    order = OrderSpec(rows=50, tokens=30, top_k=2, experts=8)
    made = inputs(
        Call("permute", (("x_TH", Spec((30, 4), torch.float32, True)), ("order", order))), "normal", torch.float32
    )
    assert len(made["order.order_P"]) == 50 == int(made["order.counts_E"].sum())
    assert (made["order.inverse_TK"] == -1).sum() == 10 and made["order.counts_E"].min() == 0
    assert made["x_TH"].dtype == torch.float64 and made["x_TH"].requires_grad
    sort = Call(
        "sort_by_expert", (("experts_TK", Spec((30, 2), torch.int64, False)), ("num_experts", 8), ("dropping", False))
    )
    experts = inputs(sort, "normal", torch.float32)["experts_TK"]
    assert experts.max() < 8 and all(len(set(row.tolist())) == 2 for row in experts)


def test_distributions_are_what_they_are_called():
    size = (100_000,)
    drawn = {name: draw(size, torch.Generator().manual_seed(0)) for name, draw in DISTRIBUTIONS.items()}
    assert drawn["normal"].std().item() == pytest.approx(1, abs=0.02)
    assert drawn["near zero"].std().item() == pytest.approx(2**-10, rel=0.02)
    assert drawn["large"].std().item() == pytest.approx(16, rel=0.02)
    # t with 2 degrees of freedom: P(|t| > 5) = 1 - 5 / sqrt(27) = 3.8 %, of normal ones 1 in 2 million.
    assert (drawn["heavy-tailed"].abs() > 5).double().mean().item() == pytest.approx(0.0377, abs=0.003)


def test_calls_that_are_too_large_are_cut_or_left_out_and_said():
    calls = capture(config(DEEPSEEK, "train.precision=bf16"), 64)
    found = check(calls, CpuOperations(), CPU, torch.bfloat16, most=2048)
    made = report(found, {})
    left_out = {row[:2]: row[2] for row in made.sections[-1].rows}
    assert made.sections[-1].title == "Not as the model calls it"
    assert {row[0] for row, text in left_out.items() if text == "not run"} >= {"unpermute"}
    assert any(text.startswith("run as ") for (name, _), text in left_out.items() if name == "linear_cross_entropy")
    for one in found:
        assert one.skipped or max(math_prod(spec) for _, spec in one.call.arguments if isinstance(spec, Spec)) <= 2048


def math_prod(spec: Spec) -> int:
    return Tensor.numel(torch.empty(spec.shape, device="meta"))


def test_every_integer_parameter_of_the_interface_can_be_made():
    """A new operation with another integer input has to say what is valid for it."""
    from trainer.verify.inputs import _INTEGERS

    known = {*_INTEGERS, "order", "num_experts", "dropping", "window", "interleaved", "eps", "limit", "scale"}
    floats = {"x", "weight", "bias", "q", "k", "v", "y", "hidden", "gate_up", "cos", "sin", "sinks", "weights"}
    for name in Operations.__abstractmethods__:
        for parameter in list(inspect.signature(getattr(Operations, name)).parameters)[1:]:
            stem = parameter.rpartition("_")[0] if parameter.rpartition("_")[2].isupper() else parameter
            assert parameter in known or stem in floats, (name, parameter)


def test_the_config_is_unchanged(tmp_path: Path):
    before = config(DEEPSEEK, "parallel.expert=2")
    capture(before, 64)
    assert before == config(DEEPSEEK, "parallel.expert=2")
