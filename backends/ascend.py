"""What this machine has of the Ascend stack. The operations on it come with a later version."""

import ctypes.util
import importlib.metadata
import os
from pathlib import Path


def ascend_state() -> str:
    """One clause on torch_npu and CANN, found without importing either: without CANN the import fails."""
    try:
        torch_npu = f"torch_npu {importlib.metadata.version('torch-npu')} is installed"
    except importlib.metadata.PackageNotFoundError:
        torch_npu = "torch_npu is not installed"
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if home and Path(home).is_dir():
        cann = f"CANN is at {home}"
    elif ctypes.util.find_library("ascendcl"):
        cann = "CANN's libraries are installed"
    else:
        cann = "CANN is not set up (ASCEND_HOME_PATH is not set)"
    return f"{torch_npu}, {cann}"
