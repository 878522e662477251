"""The tables that ``benchmarks/step.py`` prints."""

import argparse
import importlib.metadata
import os
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.registry import OURS


@dataclass
class Result:
    """The timed steps of one contender."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    groups: dict[str, float] = field(default_factory=dict)

    def add(self, answer: dict[str, Any]) -> None:
        """One more step, as the worker reports it."""
        self.seconds.append(answer["seconds"])
        self.cpu_seconds.append(answer["cpu_seconds"])
        self.losses.append(answer["loss"])
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])


def heading(args: argparse.Namespace, job: dict[str, Any], peaks: list[float]) -> str:
    """What was measured, and on what."""
    import torch

    threads = args.threads or torch.get_num_threads()
    versions = [f"torch {torch.__version__}"]
    for name in ("deepspeed", "transformers"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return "\n".join(
        [
            f"{args.config}: {job['parameters'] / 1e6:.1f} M parameters, {args.precision}, "
            f"{args.batch} x {args.sequence} tokens, {args.steps} steps",
            f"{job['device_name']}, {threads} threads; load average {load}; {', '.join(versions)}",
            *(
                [f"matrix multiply: {max(peaks) / 1e9:.0f} GFLOP/s at best, {min(peaks) / 1e9:.0f} in the worst round"]
                if peaks
                else []
            ),
            *([f"MFU is against the maker's {job['peak'] / 1e12:.0f} TFLOP/s"] if job["peak"] else []),
        ]
    )


def result_table(
    results: dict[str, Result], tokens: int, flops_per_token: float, peak: float, markdown: bool = False
) -> str:
    """One line a contender. The last column is the median over rounds of its step time over ours."""
    rows = [["contender", "tokens/s", "(min-max)", "step s", "CPU s", "MFU", "memory", "loss", "moebius is"]]
    ours = results.get(OURS[0])
    for name, result in results.items():
        middle = median(result.seconds)
        rate = tokens / middle
        pairs = zip(result.seconds, ours.seconds, strict=False) if ours else ()
        ratios = [theirs / mine for theirs, mine in pairs]
        rows.append(
            [
                name,
                f"{rate:.0f}",
                f"{tokens / max(result.seconds):.0f}-{tokens / min(result.seconds):.0f}",
                f"{middle:.3f}",
                f"{median(result.cpu_seconds):.3f}",
                f"{rate * flops_per_token / peak:.3f}",
                f"{result.peak_bytes / 2**30:.2f} GiB",
                f"{result.losses[-1]:.3f}",
                f"{median(ratios):.2f} x" if ratios and result is not ours else "",
            ]
        )
    return _laid_out(rows, markdown)


def profile_table(results: dict[str, Result], markdown: bool = False) -> str:
    """Shares of one step, a column for each contender; the last row is its length under the profiler."""
    profiled = {name: result.groups for name, result in results.items() if result.groups}
    totals = {name: sum(groups.values()) for name, groups in profiled.items()}
    rows = [["where the time goes", *profiled]]
    for group in next(iter(profiled.values()), {}):
        rows.append([group, *(f"{groups[group] / totals[name]:.1%}" for name, groups in profiled.items())])
    rows.append(["step under the profiler", *(f"{total:.3f} s" for total in totals.values())])
    return "\n" + _laid_out(rows, markdown)


def _laid_out(rows: list[list[str]], markdown: bool) -> str:
    """In columns, or as a table of Markdown."""
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
        return "\n".join(lines)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
