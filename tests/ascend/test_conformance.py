"""The table of every backend (backends/conformance.py) on the simulated NPU: values, and torch_npu's own gradients."""

import pytest
import torch

from backends.accuracy import measure
from backends.conformance import CASES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = [case for case in CASES if not case.slow]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_an_npu_gives_what_the_definition_gives(npu, executor, dtype, case):
    found = measure(case.run, case.inputs(), dtype, npu.ops, npu.device)
    assert found and not [f"{finding.name}: {finding.problem}" for finding in found if not finding.passed]
