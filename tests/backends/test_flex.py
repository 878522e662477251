"""Attention on flex_attention, by torch's own unfused form of it: what it computes, and when masks are made.

torch refuses gradients of flex_attention on the CPU because it has no kernels for them there. The unfused form, which
materialises all scores, differentiates the same function; the refusal is taken out for these tests.
"""

import gc
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from backends.accuracy import measure
from backends.conformance import Case, cases
from backends.cuda import CudaOperations
from backends.functions import compiled, flex
from backends.functions.compiled import CannotCompile, Compiled

CASES = {case.title: case for case in cases("attention")}
CHOSEN = ("packed documents, more than one block", "sinks, window and documents", "sinks, expanded gradient")
OTHERS = (
    "MLA: 192 and 128",
    "a document at each position",
    "documents in any order",
    "window",
    "window of one",
    "window longer than the sequence",
    "window and documents",
    "sinks",
    "sinks and window (gpt-oss)",
    "one key head",
)


class Flex(CudaOperations):
    def attention(self, q, k, v, scale, documents=None, window=0, sinks=None):
        return flex.attention(q, k, v, scale, documents, window, sinks)


@pytest.fixture
def unfused(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()  # it gives up on a function after eight shapes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


def chosen() -> list:
    fast = [pytest.param(CASES[title], torch.float32, id=title) for title in CHOSEN]
    slow = [
        pytest.param(CASES[title], dtype, id=f"{title}-{str(dtype)[6:]}", marks=pytest.mark.slow)
        for title in CHOSEN + OTHERS
        for dtype in (torch.bfloat16, torch.float32)
        if not (title in CHOSEN and dtype == torch.float32)
    ]
    return fast + slow


@pytest.mark.parametrize("case,dtype", chosen())
def test_flex_gives_what_the_definition_gives(unfused, case: Case, dtype: torch.dtype):
    for finding in measure(case.run, case.inputs(), dtype, Flex(), torch.device("cpu")):
        if dtype == torch.float32:
            # No run takes flex in fp32; here it shows the formulas without 16-bit rounding. The worst case has 23
            # ulps, where plain torch has 12; a share or a gradient left out costs over 10,000.
            assert finding.errors.max_ulps < 64, finding
        else:
            assert finding.passed, finding


def attend(ops: CudaOperations, documents: Tensor | None, window: int = 0, length: int = 128, **more: object) -> Tensor:
    q = torch.ones(2, length, 2, 16, dtype=more.get("dtype", torch.bfloat16))
    return ops.attention(q, q, q, 0.25, documents, window)


def test_what_is_seen_is_found_once_for_all_layers(unfused, monkeypatch):
    made = []
    make = flex._make
    monkeypatch.setattr(flex, "_make", lambda *args: made.append(args) or make(*args))
    documents = torch.zeros(2, 128, dtype=torch.int64)
    ops = Flex()
    for _ in range(3):
        attend(ops, documents)
        attend(ops, documents, window=5)
    assert len(made) == 2
    attend(ops, documents.clone())  # the next micro-batch
    assert len(made) == 3
    documents[:, 64:] = 1
    attend(ops, documents)
    assert len(made) == 4
    kept = len(flex._masks)
    del documents
    made.clear()
    gc.collect()
    assert len(flex._masks) < kept  # a mask goes with the tensor that it was made of


def test_flex_is_for_training_in_16_bits_on_an_accelerator(monkeypatch):
    q = torch.ones(1, 128, 2, 16, dtype=torch.bfloat16)
    assert not flex.serves(q, q)  # on the CPU
    monkeypatch.setattr(compiled, "DEVICES", {"cpu"})
    assert flex.serves(q, q)
    assert not flex.serves(q.float(), q.float())
    assert not flex.serves(q[:, :1], q) and not flex.serves(q[:, :127], q[:, :127])
    assert not flex.serves(q[..., :8], q[..., :8])
    with torch._subclasses.FakeTensorMode():
        assert not flex.serves(torch.ones(1, 128, 2, 16, dtype=torch.bfloat16), q)


def test_attention_takes_flex_where_there_is_something_to_skip_and_another_way_where_it_fails(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", {"cpu"})
    asked = []

    def refuse(*args: object) -> Tensor:
        asked.append(args)
        raise CannotCompile("no compiler")

    monkeypatch.setattr(flex, "attention", refuse)
    ops, documents = CudaOperations(), torch.zeros(2, 128, dtype=torch.int64)
    results = [attend(ops, documents), attend(ops, None, window=7), attend(ops, documents)]
    assert len(asked) == 3 and torch.equal(results[0], results[2])
    attend(ops, None)
    attend(ops, None, window=128)
    attend(ops, documents, dtype=torch.float32)
    assert len(asked) == 3


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_a_function_runs_as_it_is_written_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: pytest.fail("compiled"))
    assert Compiled(double)(torch.ones(1)).item() == 2


def test_a_compiler_that_fails_is_asked_once_and_its_reason_kept(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", {"cpu"})
    calls = []

    def compiles(function):
        def fail(x: Tensor) -> Tensor:
            calls.append(x)
            raise torch._dynamo.exc.Unsupported("no such instruction\nand more lines")

        return fail

    monkeypatch.setattr(torch, "compile", compiles)
    doubled = Compiled(double)
    with pytest.warns(UserWarning, match="double runs uncompiled: no such instruction$"), pytest.raises(CannotCompile):
        doubled(torch.ones(1))
    with pytest.raises(CannotCompile, match="no such instruction"):
        doubled(torch.ones(1))
    assert len(calls) == 1 and doubled.problem == "no such instruction"


def test_an_error_of_the_device_is_no_failure_of_the_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", {"cpu"})

    def compiles(function):
        def fail(x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("out of memory")

        return fail

    monkeypatch.setattr(torch, "compile", compiles)
    doubled = Compiled(double)
    with pytest.raises(torch.OutOfMemoryError):
        doubled(torch.ones(1))
    assert doubled.problem == ""
