"""`moebius info`: versions, devices, and what each backend can do on this machine or why it cannot."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from launch.arguments import Parser
from launch.errors import run

_PACKAGES = {
    "moebius": "moebius-train",
    "torch": "torch",
    "deepspeed": "deepspeed",
    "torch_npu": "torch-npu",
    "deep_ep": "deep-ep",
}


def main(argv: list[str]) -> int:
    """Print what this machine has and what Moebius can do with it."""
    parser = Parser(prog="moebius info", description="Versions, devices and what each backend can do here.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    return run(lambda: _info(args.json), debug=False)


def _info(as_json: bool) -> int:
    from backends import describe_all

    described = describe_all()  # first: it loads torch_npu where that is installed, and torch then finds the NPU
    found = {"versions": versions(), "devices": devices(), "backends": described}
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def versions() -> dict[str, str | None]:
    """Version of Python and of each package that matters; None for what is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for name, package in _PACKAGES.items():
        try:
            installed[name] = version(package)
        except PackageNotFoundError:
            installed[name] = None
    return installed


def devices() -> dict[str, Any]:
    """Threads that torch computes with on the CPU, and the accelerators that torch finds."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "cpu_threads": torch.get_num_threads(),
        "accelerator": accelerator.type if accelerator else None,
        "accelerators": torch.accelerator.device_count(),
    }


def _print(found: dict[str, Any]) -> None:
    from launch.show import console, table

    out = console()
    shown = table("package", "version")
    for name, number in found["versions"].items():
        shown.add_row(name, number or "not installed")
    out.print(shown)
    had = found["devices"]
    accelerators = f"{had['accelerators']} {had['accelerator']}" if had["accelerators"] else "no"
    out.print(f"\n{had['cpu_threads']} CPU threads, {accelerators} accelerators", style="bold")
    for backend in found["backends"]:
        out.print()
        shown = table(backend["name"], "can be used here" if backend["available"] else "cannot be used here")
        for row in _rows(backend):
            shown.add_row(*row)
        out.print(shown)


def _rows(backend: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of one record of ``backends.describe_all``."""
    from trainer.metrics.units import gib, si

    if not backend["available"]:
        would = [(slot, f"would be {served}") for slot, served in _operations(backend)]
        return [("why not", backend["reason"]), *would]
    memory = backend["memory"]
    rows = [
        ("device", backend["device"]),
        ("memory", f"{gib(memory['total'])}, of which this process holds {gib(memory['allocated'])}"),
        ("distributed", backend["distributed_backend"]),
    ]
    for dtype in backend["dtypes"]:
        rate = "" if dtype in backend["native"] else ", emulated"
        rows.append((dtype, f"{si(backend['peak_flops'][dtype], 'FLOP/s')} peak{rate}"))
    return rows + _operations(backend)


def _operations(backend: dict[str, Any]) -> list[tuple[str, str]]:
    """(operation, what serves it and why not the usual) of one record."""
    return [
        (slot, served["implementation"] + (f" ({served['fallback']})" if served["fallback"] else ""))
        for slot, served in backend["operations"].items()
    ]
