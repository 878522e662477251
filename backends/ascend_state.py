"""What this machine has of the Ascend stack, what is wrong with it, and how torch_npu is loaded.

torch_npu cannot be imported without CANN, and fails with a page of text where versions differ. So everything that can
be known before the import is looked at before it.
"""

import ctypes
import importlib
import importlib.metadata
import os
import re

import torch

ENVIRONMENT = {
    "HCCL_DETERMINISTIC": "true",  # reductions add in one order; use_deterministic_algorithms does not say so to HCCL
    "HCCL_CONNECT_TIMEOUT": "600",  # seconds for the ranks to find each other; 120 are short for many hosts
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",  # fits varying expert loads
    "CPU_AFFINITY_CONF": "1",  # threads stay on the cores next to their NPU
}
"""Variables that CANN and torch_npu read when they are loaded; :func:`load` sets those that the user has not."""

_SETUP = "install CANN and run `source /usr/local/Ascend/ascend-toolkit/set_env.sh`, or use backend=cpu"


def ascend_problem() -> tuple[str, str] | None:
    """Why an NPU cannot be used here and what to do about it; None when it can, and then torch_npu is loaded."""
    return _package_problem() or _cann_problem() or _device_problem()


def _package_problem() -> tuple[str, str] | None:
    wanted = _release(torch.__version__)
    try:
        found = importlib.metadata.version("torch-npu")
    except importlib.metadata.PackageNotFoundError:
        return "torch_npu is not installed", f"pip install torch-npu=={wanted}, or use backend=cpu"
    if _release(found) != wanted:
        return f"torch_npu {found} is not for torch {torch.__version__}", f"pip install torch-npu=={wanted}"
    built_for = torch.version.cuda or torch.version.hip
    if built_for:
        return (
            f"torch {torch.__version__} is built for GPUs, which torch_npu does not go with",
            f"pip install torch=={wanted} --index-url https://download.pytorch.org/whl/cpu",
        )
    return None


def _cann_problem() -> tuple[str, str] | None:
    if not os.environ.get("ASCEND_HOME_PATH"):  # DeepSpeed reads it too
        return "CANN is not set up: there is no ASCEND_HOME_PATH", _SETUP
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError as error:
        return f"CANN at ASCEND_HOME_PATH={os.environ['ASCEND_HOME_PATH']} cannot be loaded: {error}", _SETUP
    return None


def _device_problem() -> tuple[str, str] | None:
    try:
        load()
    except Exception as error:  # ImportError, OSError, RuntimeError: whatever its libraries find
        return (
            f"torch_npu cannot be loaded: {_first_line(error)}",
            f"check CANN's version against torch_npu's; {_SETUP}",
        )
    if not torch.get_device_module("npu").device_count():
        return "torch_npu finds no NPU", "check `npu-smi info`, the driver and ASCEND_RT_VISIBLE_DEVICES"
    return None


def load() -> None:
    """Import torch_npu, with its environment in place. It registers the device ``npu`` with torch."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    importlib.import_module("torch_npu")


def _release(version: str) -> str:
    """The release of a version: 2.13.0 of 2.13.0+cpu and of 2.13.0.post1."""
    found = re.match(r"\d+(\.\d+){0,2}", version)
    return found.group() if found else version


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
