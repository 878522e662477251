"""One contender in a process of its own: builds once, then works when told, so that contenders can alternate.

The first line on standard input is the job (JSON), each further line a command; every line is answered by one line
of JSON on standard output. Whatever the contender itself prints goes to standard error.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    if job["tuned"]:
        import backends  # noqa: F401  (allocator settings, before torch is imported)
    try:
        commands = _serve(job)
    except Exception as error:
        _refuse(answers, error)
        return
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        try:
            _answer(answers, commands[line.strip()]())
        except Exception as error:
            _refuse(answers, error)
            return


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")


def _refuse(answers: TextIO, error: Exception) -> None:
    from benchmarks.contender import Unavailable

    traceback.print_exc()
    known = isinstance(error, Unavailable | ImportError)
    text = " ".join(str(error).split())
    _answer(answers, {"error": text if known else f"{type(error).__name__}: {text}"})


def _serve(job: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    from benchmarks.breakdown import profile_step
    from benchmarks.registry import make

    contender = make(job)
    generator = torch.Generator().manual_seed(0)

    def tokens() -> torch.Tensor:
        return torch.randint(job["model"]["vocab_size"], (job["batch"], job["sequence"]), generator=generator).to(
            device
        )

    def step() -> dict[str, Any]:
        batch = tokens()
        synchronize(device)
        began, cpu = time.perf_counter(), time.process_time()
        loss = contender.step(batch)
        synchronize(device)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "loss": float(loss),
            "peak_bytes": _peak_bytes(device),
            "parameters": contender.parameters,
        }

    return {
        "step": step,
        "matmul": lambda: _matmul(device, job["precision"]),
        "profile": lambda: {
            "groups": profile_step(
                lambda: contender.step(tokens()), lambda: synchronize(device), on_device=device.type == "cuda"
            )
        },
    }


def _matmul(device: Any, precision: str) -> dict[str, Any]:
    """Peak of this moment. bf16 counts as fp32 where that is faster: operands can be widened."""
    import torch

    from benchmarks.contender import matmul_flops

    dtypes = [torch.float32] + ([torch.bfloat16] if precision == "bf16" else [])
    return {"flops": max(matmul_flops(device, dtype, 0.5) for dtype in dtypes)}


def synchronize(device: Any) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize()


def _peak_bytes(device: Any) -> int:
    """Most memory so far: of the process (torch's libraries included) on the CPU, of the allocator elsewhere."""
    if device.type == "cpu":
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    import torch

    return torch.accelerator.max_memory_allocated()


if __name__ == "__main__":
    main()
