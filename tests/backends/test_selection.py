"""select and describe_all: what is here, what is not, and the line a person reads about it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import backends
from backends import UserError, ascend_state, peak, processor, selection
from backends.cpu import CpuBackend


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))


def test_auto_takes_the_cpu_where_there_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    backend = backends.select()
    assert (backend.name, backend.device, backend.distributed_backend) == ("cpu", torch.device("cpu"), "gloo")
    assert backend.environment()["DS_ACCELERATOR"] == "cpu"


def test_auto_takes_the_accelerator_that_torch_finds(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(selection, "cuda_problem", lambda: None)

    class Fake:
        def __init__(self, index):
            self.index = index

        def environment(self):
            return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "DS_ACCELERATOR": "cuda"}

    monkeypatch.setattr(selection, "_ACCELERATED", {"cuda": Fake})
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "mine")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert backends.select().index == 3
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["DS_ACCELERATOR"] == "mine"  # what a person chose stays
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="LOCAL_RANK=4: this machine has 4 devices"):
        backends.select()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_cuda_without_cuda_says_why_and_what_to_do():
    with pytest.raises(UserError, match=r"backend: 'cuda' is not available here \(.+\); use backend=cpu") as error:
        backends.select("cuda")
    assert "\n" not in str(error.value)


CANN = {"ASCEND_HOME_PATH": "/usr/local/Ascend"}


def _installed(patch, version="2.13.0", variables=CANN, gpus=None, cann=True, loads=None, devices=1):
    """Pretend that this much of the Ascend stack is here. ``loads`` is the exception of torch_npu's import."""

    def load():
        if loads is not None:
            raise loads

    def library(name):
        if not cann:
            raise OSError(f"{name}: cannot open shared object file")

    patch.delenv("ASCEND_HOME_PATH", raising=False)
    for name, value in variables.items():
        patch.setenv(name, value)
    patch.setattr(ascend_state.importlib.metadata, "version", lambda name: version)
    patch.setattr(ascend_state.ctypes, "CDLL", library)
    patch.setattr(ascend_state, "load", load)
    patch.setattr(torch, "__version__", "2.13.0+cpu")
    patch.setattr(torch.version, "cuda", gpus)
    patch.setattr(torch, "get_device_module", lambda name: SimpleNamespace(device_count=lambda: devices))


ASCEND_PROBLEMS = {
    r"torch_npu 2.12.0 is not for torch 2.13.0\+cpu\); pip install torch-npu==2.13.0": {"version": "2.12.0"},
    r"torch 2.13.0\+cpu is built for GPUs.*\); pip install torch==2.13.0 --index-url .*/cpu": {"gpus": "13.0"},
    r"CANN is not set up: there is no ASCEND_HOME_PATH\); install CANN and run `source .*set_env.sh`": {
        "variables": {}
    },
    r"CANN at ASCEND_HOME_PATH=/usr/local/Ascend cannot be loaded: libascendcl.so: .*set_env.sh": {"cann": False},
    r"torch_npu cannot be loaded: libhccl.so\); check CANN's version": {"loads": ImportError("libhccl.so\nmore")},
    r"torch_npu finds no NPU\); check `npu-smi info`, the driver and ASCEND_RT_VISIBLE_DEVICES": {"devices": 0},
}


@pytest.mark.parametrize("line", ASCEND_PROBLEMS)
def test_ascend_says_what_is_wrong_and_what_to_do(monkeypatch, line):
    _installed(monkeypatch, **ASCEND_PROBLEMS[line])
    with pytest.raises(UserError, match=rf"backend: 'ascend' is not available here \({line}") as error:
        backends.select("ascend")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert backends.select("auto").name == "cpu"


def test_ascend_without_torch_npu(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(UserError, match="torch_npu is not installed.; pip install torch-npu==2.13.0, or use backend=c"):
        backends.select("ascend")


def test_all_of_ascend_is_no_problem(monkeypatch):
    _installed(monkeypatch, version="2.13.0.post1")
    assert ascend_state.ascend_problem() is None


def test_torch_does_not_load_torch_npu_by_itself():
    """Where CANN is missing `import torch` would fail before anybody could say so."""
    show = "import backends, os; print(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"
    for given, expected in (({}, "0"), ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}, "1")):
        inherited = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
        told = subprocess.run([sys.executable, "-c", show], env=inherited | given, capture_output=True, text=True)
        assert told.stdout.strip() == expected, told.stderr


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UserError, match="there is no 'tpu'; use auto, cpu, cuda or ascend"):
        backends.select("tpu")


def test_describe_all_covers_every_backend_and_operation(monkeypatch):
    monkeypatch.setattr(peak, "_measure", lambda device, dtype, seconds: 1e9)
    records = {record["name"]: record for record in backends.describe_all()}
    assert list(records) == ["cpu", "cuda", "ascend"]
    cpu = records["cpu"]
    assert cpu["available"] and cpu["device"] and "float32" in cpu["dtypes"] and cpu["distributed_backend"] == "gloo"
    assert all(set(record["operations"]) == set(backends.Operations.__abstractmethods__) for record in records.values())
    assert cpu["peak_flops"]["float32"] == 1e9 and cpu["memory"]["total"] > cpu["memory"]["allocated"] > 0
    for record in records.values():
        assert record["available"] == (record["reason"] == "")


def test_the_best_peak_ever_measured_is_kept(monkeypatch):
    figures = iter([5e9, 4e9, 8e9, 6e9, 7e9])
    monkeypatch.setattr(peak, "_measure", lambda device, dtype, seconds: next(figures))
    assert CpuBackend().peak_flops(torch.float32) == 5e9
    assert CpuBackend().peak_flops(torch.float32) == 5e9  # a busy moment
    assert CpuBackend().peak_flops(torch.float32) == 8e9
    monkeypatch.setattr(torch, "get_num_threads", lambda: 977)
    assert CpuBackend().peak_flops(torch.float32) == 6e9  # another thread count is another figure
    peak.cache_file().write_text("not json")
    assert CpuBackend().peak_flops(torch.float32) == 7e9


def test_peak_without_a_place_for_the_cache(monkeypatch, tmp_path):
    (tmp_path / ".cache").write_text("a file where the folder should be")
    monkeypatch.setattr(peak, "_measure", lambda device, dtype, seconds: 3.0)
    assert CpuBackend().peak_flops(torch.float32) == 3.0


def test_a_measured_peak_is_plausible():
    value = peak.measured(torch.device("cpu"), "test", torch.float32, seconds=0.05)
    assert 1e8 < value < 1e15


def test_published_figures():
    assert peak.published("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.4e12
    assert peak.published("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert peak.published("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak.published("Some other device", torch.bfloat16) is None


def test_bf16_peak_is_that_of_the_way_it_is_computed(monkeypatch):
    monkeypatch.setattr(
        peak, "_measure", lambda device, dtype, seconds: {torch.float32: 2.0, torch.bfloat16: 9.0}[dtype]
    )
    monkeypatch.setattr(processor, "multiplies_bf16", lambda: False)
    assert CpuBackend().peak_flops(torch.bfloat16) == 2.0 and not CpuBackend().native(torch.bfloat16)
    monkeypatch.setattr(processor, "multiplies_bf16", lambda: True)
    assert CpuBackend().peak_flops(torch.bfloat16) == 9.0 and CpuBackend().native(torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_sees_an_allocation_and_its_peak():
    backend = CpuBackend()
    before = backend.memory()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    during = backend.memory()
    assert during.allocated - before.allocated > 40 * 2**20 and during.peak >= during.allocated
    assert block.sum() == block.numel()


def test_determinism_is_switched_on_and_off():
    backend = CpuBackend()
    try:
        backend.set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        backend.set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


VARYING_SIZES = """
import random
import backends
import torch

random.seed(0)
backend = backends.select("cpu")
live = []
start = backend.memory().allocated
for step in range(600):
    live.append(torch.empty(random.randint(1, 4 * 2**20)).fill_(1))
    if len(live) > 10:
        live.pop(random.randrange(10))
    if step == 200:
        settled = backend.memory().allocated - start
print(settled, backend.memory().allocated - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_kept_memory_does_not_grow_without_end():
    """Ten live tensors of 8 MB on average: freed memory is kept, but what is kept stays within a few times that."""
    command = [sys.executable, "-c", VARYING_SIZES]
    root = os.path.dirname(os.path.dirname(backends.__file__))
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    settled, final = map(int, done.stdout.split())
    assert final < 1.5 * settled + 64 * 2**20 and final < 500 * 2**20


def test_the_environment_is_set_on_import_and_leaves_what_a_person_chose():
    code = "import os, backends; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    root = os.path.dirname(os.path.dirname(backends.__file__))
    for chosen, expected in ((None, "1"), ("0", "0")):
        environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        if chosen:
            environment["THP_MEM_ALLOC_ENABLE"] = chosen
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, env=environment
        )
        assert done.stdout.strip() == expected
