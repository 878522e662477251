"""Every operation at every kind of input (backends/conformance.py) and dtype, forward and backward.

The definition is checked against the textbook formula in fp64, and what runs on a device against the definition.
"""

import pytest
import torch

from backends.accuracy import measure
from backends.conformance import CASES, Case
from backends.cpu import CpuOperations
from backends.operations import Operations
from backends.plain import PlainOperations

# How far an operation may be off on average, in ulps, beside what `measure` allows it in comparison with plain torch.
# fp32: sums of up to a thousand terms, each rounded; the worst case here has 2. Narrow dtypes sum in fp32, so that
# only a few roundings of operands and results are left; the worst has 0.8, the loss of a single token. Sums of 100,000
# terms in fp32 have no such bound: plain torch's is 60.
MEAN_ULPS = {torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def marked(case: Case) -> object:
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])


table = pytest.mark.parametrize("case", [marked(case) for case in CASES])


@table
@pytest.mark.parametrize("dtype", MEAN_ULPS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_device_gives_what_the_definition_gives(place, dtype, case):
    found = measure(case.run, case.inputs(), dtype, place.ops, place.device)
    assert found
    assert not [f"{finding.name}: {finding.problem}" for finding in found if not finding.passed]
    for finding in found:
        if finding.errors and not (case.slow and dtype == torch.float32):
            assert finding.errors.mean_ulps <= MEAN_ULPS[dtype], finding


@table
def test_the_definition_is_the_textbook_formula(case):
    """In fp64, where `measure` takes the definition for its reference and anything goes that agrees with it."""
    inputs = case.inputs()
    narrow = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.dtype == torch.float32}
    inputs |= {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in narrow.items()}
    found = measure(case.run, inputs, torch.float64, CpuOperations(), torch.device("cpu"))
    for finding in found:
        assert finding.passed, finding
        # `plain` is the formula and its error the difference from the definition: the same terms in other orders. The
        # worst case has 4 on average, and 27 of those with sums of 100,000 terms.
        assert finding.plain is None or finding.plain.mean_ulps < (64 if case.slow else 16), finding


def test_every_operation_is_in_the_table():
    assert {case.operation for case in CASES} == Operations.__abstractmethods__
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_inputs_are_drawn_alike_each_time():
    for case in CASES:
        if not case.slow:
            for ours, again in zip(case.inputs().values(), case.inputs().values(), strict=True):
                assert ours is again is None or torch.equal(ours, again)


def test_the_textbook_formula_has_another_way_than_the_definition():
    """An operation that both share would be compared with itself."""
    for name in Operations.__abstractmethods__:
        assert getattr(PlainOperations, name) is not getattr(CpuOperations, name)
