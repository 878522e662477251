"""`moebius train --dry-run`: what one rank of a layout would hold and send, without the other ranks."""

import os
from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.dry_run import Prediction


def dry_run(
    path: str, overrides: list[str], world_size: int = 1, rank: int = 0, imbalance: float = 1.0, json: bool = False
) -> int:
    """Predict and print."""
    from backends.errors import UserError
    from trainer.config.load import load_with_origins

    if "RANK" in os.environ:
        raise UserError("--dry-run: is one process; start it without a launcher, with --world-size and --rank")
    config, origins = load_with_origins(path, overrides)

    from trainer.dry_run import predict

    with origins.named():
        found = predict(config, path, world_size, rank, imbalance)
    if json:
        sent = [{"group": group, "operation": kind, **asdict(s)} for (group, kind), s in found.sent.items()]
        print(dumps({"rank": rank, **vars(found), "sent": sent}, indent=2))
    else:
        _print(found, rank, world_size, imbalance, config.train.precision)
    return 0


def _print(found: "Prediction", rank: int, world_size: int, imbalance: float, precision: str) -> None:
    from launch.show import console, table
    from trainer.metrics.units import gib, si

    out = console()
    place = ", ".join(f"{axis} {number} of {size}" for axis, (number, size) in found.place.items())
    out.print(f"rank {rank} of {world_size:,} ({place}): {si(found.parameters)} parameters, {precision}")
    share = "an even share" if imbalance == 1 else f"{imbalance:g} times the even share"
    out.print(
        f"micro-batches of a step: {found.micro_batches}; {share} of the tokens for its experts; CPU operations\n"
    )
    memory = table("memory at the peak of a step", "", numbers=1)
    for category, size in found.at_peak.items():
        memory.add_row(category, gib(size))
    memory.add_section()
    memory.add_row("all", gib(found.peak), style="bold")
    memory.add_row("before the first step, at most", gib(found.building))
    out.print(memory)
    out.print()
    sent = table("sent in a step over", "operation", "calls", "", numbers=2)
    for (group, kind), counted in sorted(found.sent.items()):
        sent.add_row(group, kind, f"{counted.calls:,}", gib(counted.bytes))
    out.print(sent if found.sent else "nothing is sent")
    stages, stage = found.place["pp"][1], world_size // found.place["pp"][1]
    if stages > 1:
        out.print(
            f"\nRanks of a pipeline stage are alike; stage s begins with --rank {stage} times s (0 to {stages - 1})."
        )
