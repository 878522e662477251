"""`moebius params`: parameters of a config's model by part, without allocating them."""

import json

from launch.arguments import ConfigParser
from launch.errors import run


def main(argv: list[str]) -> int:
    """Print total and active-per-token parameters by part, and the model FLOPs of a training token."""
    parser = ConfigParser("moebius params", "Count the parameters of a model by part; nothing is allocated.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse(argv)
    return run(lambda: _params(args.config, args.overrides, args.json), debug=False)


def _params(path: str, overrides: list[str], as_json: bool) -> int:
    from trainer.config.load import load_config

    config = load_config(path, overrides)

    from backends import select
    from launch.show import console, table
    from trainer.metrics.units import si
    from trainer.model import MoETransformer
    from trainer.model.count import count_parameters, flops_per_token

    model = MoETransformer(config.model, select("cpu").ops, device="meta")
    counts = count_parameters(model)
    total, active = (sum(count[which] for count in counts.values()) for which in (0, 1))
    length = config.data.sequence_length
    flops = flops_per_token(config.model, length)
    if as_json:
        parts = {part: count._asdict() for part, count in counts.items()}
        print(json.dumps({"parts": parts, "total": total, "active": active, "flops_per_token": flops}, indent=2))
        return 0
    shown = table("part", "total", "", "active per token", "", numbers=4)
    for part, count in counts.items():
        shown.add_row(part, f"{count.total:,}", si(count.total), f"{count.active:,}", si(count.active))
    shown.add_section()
    shown.add_row("all", f"{total:,}", si(total), f"{active:,}", si(active), style="bold")
    out = console()
    out.print(shown)
    out.print(f"\n{si(flops, 'FLOP')} per training token at sequence length {length}, forward and backward")
    return 0
