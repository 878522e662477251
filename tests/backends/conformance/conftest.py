"""Which backend the table is run on.

MOEBIUS_TEST_BACKEND names one that is here (`make test-cuda`, `make test-ascend`); the session ends with code 2 where
it is not. Without it the table runs on the CPU, with the CPU's operations and with CudaOperations, which hold no CUDA
call of their own.
"""

import os
from dataclasses import dataclass

import pytest
import torch

from backends import Operations, UserError, select
from backends.cpu import CpuOperations
from backends.cuda import CudaOperations

CHOSEN = os.environ.get("MOEBIUS_TEST_BACKEND", "")


@dataclass(frozen=True)
class Place:
    """Operations, and the device that they run on."""

    name: str
    ops: Operations
    device: torch.device


def places() -> list[Place]:
    cpu = torch.device("cpu")
    if not CHOSEN:
        return [Place("cpu", CpuOperations(), cpu), Place("cuda-on-cpu", CudaOperations(), cpu)]
    backend = select(CHOSEN)
    backend.set_deterministic(True)  # as a run does by default, so that what torch refuses shows here
    return [Place(backend.name, backend.ops, backend.device)]


def pytest_configure() -> None:
    try:
        places()
    except UserError as error:
        pytest.exit(str(error), returncode=2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", places(), ids=lambda place: place.name)
