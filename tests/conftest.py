"""Fixtures that more than one folder uses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel import topology
from tests.small import write_inputs


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small config and its text, tokenized once for the whole session."""
    return write_inputs(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def alone() -> Iterator[None]:
    """One process group of this one process for all tests: DeepSpeed keeps pieces of the first it meets."""
    yield
    topology.stop()
