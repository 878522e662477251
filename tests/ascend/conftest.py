"""A simulated NPU: real torch_npu over a stand-in for CANN (cann/), and operators that run on the host (executor.py).

It needs an environment of its own, because torch_npu is never put beside torch where there is no NPU:
`make test-ascend-sim` makes one and runs this folder. Everywhere else its tests are skipped.
"""

import importlib.util
import os
from pathlib import Path

import pytest

SIMULATED = os.environ.get("MOEBIUS_SIMULATED_NPU") == "1" and importlib.util.find_spec("torch_npu") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SIMULATED:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="runs in an environment of its own: make test-ascend-sim"))


@pytest.fixture(scope="session")
def npu():
    """The backend of the simulated NPU."""
    from backends import select

    backend = select("ascend")
    backend.set_deterministic(True)  # as a run does by default, so that what torch refuses shows here
    return backend


@pytest.fixture
def executor():
    """NPU tensors compute in this test."""
    from tests.ascend.executor import HostExecutor

    with HostExecutor() as running:
        yield running
