"""What DeepEP cannot serve is said before the run begins, with the remedy."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from backends.errors import UserError
from parallel.deepep import check
from tests.distributed import deep_ep

CUDA: Any = SimpleNamespace(name="cuda")
INSTALL = "; use all-to-all, or install it from https://github.com/deepseek-ai/DeepEP"


def refusal(backend: Any, ranks: int, hidden: int) -> str:
    with pytest.raises(UserError) as raised:
        check(backend, ranks, hidden, "x.yaml")
    before = "x.yaml: parallel.dispatcher: deepep "
    text = str(raised.value)
    assert text.startswith(before)
    return text.removeprefix(before)


def test_another_backend():
    problem = refusal(SimpleNamespace(name="ascend"), 8, 64)
    assert problem == (
        "has kernels for NVIDIA GPUs only, and the backend is ascend; use all-to-all, or a machine with such GPUs"
    )


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    assert refusal(CUDA, 8, 64) == "cannot be imported (import of deep_ep halted; None in sys.modules)" + INSTALL


def test_a_build_without_the_buffer(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    assert refusal(CUDA, 8, 64) == "cannot be imported (it was built without deep_ep.Buffer)" + INSTALL


def test_ranks_and_sizes(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", deep_ep)
    check(CUDA, 8, 64, "x.yaml")
    assert refusal(CUDA, 6, 64) == (
        "has no configuration for parallel.expert=6; use all-to-all, or parallel.expert=2, 4, 8, 16, 32 or 64"
    )
    assert refusal(CUDA, 8, 60) == (
        "copies 16 bytes at a time, and model.hidden_size=60; use all-to-all, or a multiple of 8"
    )
