"""Weight gradients in slots and put off: the same numbers as plain autograd gives, in the right place, exactly once."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backends import Operations
from backends.cpu import CpuOperations
from backends.cuda import CudaOperations
from backends.functions import matmul
from backends.weight_gradients import GradientSlot, Store, deferred

DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [3, 0, 5, 1]


@pytest.fixture(params=[CpuOperations, CudaOperations], ids=["cpu", "cuda"])
def ops(request: pytest.FixtureRequest) -> Operations:
    torch.manual_seed(0)
    return request.param()


class Small(nn.Module):
    """Each operation that owns a weight, once: a projection with a bias, experts of which one is idle, the head."""

    def __init__(self, ops: Operations, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.ops, self.runs = ops, 0
        self.project, self.experts, self.head = (
            nn.Parameter(torch.randn(*shape).to(dtype)) for shape in ((8, 8), (len(COUNTS), 16, 8), (24, 16))
        )
        self.bias = nn.Parameter(torch.randn(8).to(dtype))

    def body(self, x_TH: Tensor) -> Tensor:
        self.runs += 1
        y = self.ops.linear(x_TH, self.project, self.bias)
        return self.ops.grouped_mm(y, self.experts, torch.tensor(COUNTS))

    def forward(self, x_TH: Tensor, recompute: bool = False) -> Tensor:
        y = checkpoint(self.body, x_TH, use_reentrant=False) if recompute else self.body(x_TH)
        return self.ops.linear_cross_entropy(y, self.head, torch.arange(y.shape[0]))[0] / 3


def inputs(dtype: torch.dtype = torch.float32, number: int = 2) -> list[Tensor]:
    return [torch.randn(sum(COUNTS), 8).to(dtype).requires_grad_() for _ in range(number)]


def with_slots(model: nn.Module) -> dict[str, GradientSlot]:
    """As the engine does it; the buffers hold what nobody may read."""
    slots = {}
    for name, parameter in model.named_parameters():
        slot = GradientSlot(torch.full(parameter.shape, float("nan")))
        slots[name] = parameter.gradient_slot = slot

        def fold(parameter: Tensor, slot: GradientSlot = slot) -> None:
            if parameter.grad is not None:  # the hook runs for a returned None as well
                slot.add(parameter.grad)
                parameter.grad = None

        parameter.register_post_accumulate_grad_hook(fold)
    return slots


def taken(model: nn.Module, slots: dict[str, GradientSlot] | None = None) -> dict[str, Tensor]:
    if slots is None:
        return {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    for slot in slots.values():
        slot.close()
    return {name: slot.view for name, slot in slots.items()}


def copy_of(model: Small) -> Small:
    copy = Small(model.ops, model.project.dtype)
    copy.load_state_dict(model.state_dict())
    return copy


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert torch.equal(grad, theirs[name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_a_slot_gets_what_autograd_gives(ops, recompute):
    plain = Small(ops)
    model = copy_of(plain)
    slots = with_slots(model)
    x = inputs()
    for step in range(2):  # the second one must not see the first
        plain.zero_grad()
        plain(x[step]).backward()
        model(x[step], recompute).backward()
        assert_equal(taken(model, slots), taken(plain))
        assert slots["experts"].view[1].count_nonzero() == 0


def test_micro_batches_add_up(ops):
    plain = Small(ops)
    model = copy_of(plain)
    slots = with_slots(model)
    for x in inputs():
        plain(x).backward()
        model(x).backward()
    for ours, theirs in zip(taken(model, slots).values(), taken(plain).values(), strict=True):
        # One rounding fewer: the second product is added to the first inside the multiply.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


def test_bf16_products_reach_the_slot_in_fp32(monkeypatch):
    monkeypatch.setattr(matmul.processor, "multiplies_bf16", lambda: False)
    torch.manual_seed(0)
    ops = CpuOperations()
    weight = nn.Parameter(torch.randn(16, 8).bfloat16())
    experts = nn.Parameter(torch.randn(2, 16, 8).bfloat16())
    weight.gradient_slot, experts.gradient_slot = (GradientSlot(torch.empty(w.shape)) for w in (weight, experts))
    x, grad = torch.randn(9, 8).bfloat16(), torch.randn(9, 16).bfloat16()
    ops.linear(x, weight).backward(grad)
    ops.grouped_mm(x, experts, torch.tensor([9, 0])).backward(grad)
    expected = grad.float().T @ x.float()
    assert torch.equal(weight.gradient_slot.view, expected)
    assert torch.equal(experts.gradient_slot.view, torch.stack([expected, torch.zeros(16, 8)]))


def test_bf16_micro_batches_add_up_in_fp32(ops):
    """A gradient of 2^-9 on one of 1: lost where bf16 adds them."""
    weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.bfloat16))
    weight.gradient_slot = GradientSlot(torch.empty(weight.shape))
    experts = nn.Parameter(torch.zeros(1, 16, 8, dtype=torch.bfloat16))
    experts.gradient_slot = GradientSlot(torch.empty(experts.shape))
    for value in (1.0, 2.0**-9):
        x = torch.full((1, 8), value, dtype=torch.bfloat16)
        ops.linear(x, weight).sum().backward()
        ops.grouped_mm(x, experts, torch.tensor([1])).sum().backward()
    for slot in (weight.gradient_slot, experts.gradient_slot):
        assert (slot.view == 1.0 + 2.0**-9).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("slotted", [False, True])
def test_deferred_is_immediate_later(ops, dtype, slotted, recompute):
    now = Small(ops, dtype)
    later = copy_of(now)
    now_slots, later_slots = (with_slots(model) if slotted else None for model in (now, later))
    x = inputs(dtype)
    late_x = [x_TH.detach().clone().requires_grad_() for x_TH in x]
    stores = []
    for x_TH in x:
        now(x_TH).backward()
    for x_TH in late_x:
        loss = later(x_TH, recompute)
        with deferred() as store:
            loss.backward()
        stores.append(store)
    assert later.runs == len(x) * (2 if recompute else 1)
    weights = {"project", "experts", "head"}
    for name, parameter in later.named_parameters():
        reached = later_slots[name].filled if later_slots else parameter.grad is not None
        assert reached == (name not in weights), name
    for store in stores:
        store.run()
        store.run()  # nothing is left
    assert later.runs == len(x) * (2 if recompute else 1)
    assert_equal(taken(later, later_slots), taken(now, now_slots))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(late_x, x, strict=True))


@pytest.mark.parametrize("put_off", [False, True])
@pytest.mark.parametrize("slotted", [False, True])
def test_a_weight_used_three_times(ops, slotted, put_off):
    """Tied embeddings and two heads: torch's gradient of the lookup meets ours, whichever comes first."""
    tokens, labels = torch.tensor([1, 3, 3, 0]), torch.tensor([3, 3, 0, 2])

    def loss(weight: Tensor, linear: Callable, cross_entropy: Callable) -> Tensor:
        x = F.embedding(tokens, weight)
        return cross_entropy(x, weight, labels) + cross_entropy(
            linear(x, weight[:8]) + linear(x, weight), weight, labels
        )

    def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    start = torch.randn(8, 8)
    reference = nn.Parameter(start.double())
    model = nn.ParameterDict({"weight": nn.Parameter(start.clone())})
    slots = with_slots(model) if slotted else None
    for _ in range(2):
        loss(reference, F.linear, plain).backward()
        ours = loss(model["weight"], ops.linear, lambda *given: ops.linear_cross_entropy(*given)[0])
        if put_off:
            with deferred() as store:
                ours.backward()
            store.run()
        else:
            ours.backward()
    # fp32 sums of a few dozen terms, in other orders.
    torch.testing.assert_close(taken(model, slots)["weight"].double(), reference.grad, rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_computed_cannot_wait(ops):
    weight = nn.Parameter(torch.randn(4, 8))
    with deferred() as store:
        ops.linear(torch.randn(3, 8), weight * 2).sum().backward()
    assert weight.grad is not None and weight.grad.count_nonzero()
    before = weight.grad.clone()
    store.run()
    assert torch.equal(weight.grad, before)


def test_deferral_ends_with_its_block(ops):
    weight = nn.Parameter(torch.randn(4, 8))
    with pytest.raises(KeyError), deferred() as outer:
        with deferred() as inner:
            ops.linear(torch.ones(3, 8), weight).sum().backward()
        inner.run()
        assert (weight.grad == 3).all()
        ops.linear(torch.ones(3, 8), weight).sum().backward()
        assert (weight.grad == 3).all()
        raise KeyError
    ops.linear(torch.ones(3, 8), weight).sum().backward()
    assert (weight.grad == 6).all()
    outer.run()
    assert (weight.grad == 9).all()


def test_a_store_runs_in_order_and_lets_go():
    store, done = Store(), []
    for number in range(3):
        store.put(lambda number=number: done.append(number))
    store.run()
    store.run()
    assert done == [0, 1, 2]


def test_a_weight_that_took_no_part_has_gradient_zero():
    slot = GradientSlot(torch.full((2,), float("nan")))
    slot.close()
    assert (slot.view == 0).all()
    slot.add(torch.ones(2))
    slot.close()
    assert (slot.view == 1).all()  # left for the optimizer
    slot.close()
    assert (slot.view == 0).all()
