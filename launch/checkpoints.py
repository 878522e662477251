"""`moebius checkpoints`: what a run directory holds, and whether it can be trusted."""

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.arguments import Parser
from launch.errors import run

DAMAGED = 1


def main(argv: list[str]) -> int:
    """List the checkpoints of a run; with ``--verify``, read every file of them."""
    parser = Parser(prog="moebius checkpoints", description="List the checkpoints of a run directory.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run, or the folder of one checkpoint")
    parser.add_argument("--verify", action="store_true", help="read every file and name the damaged ones")
    args = parser.parse_args(argv)
    return run(lambda: _checkpoints(args), debug=False)


def _checkpoints(args: argparse.Namespace) -> int:
    from backends.errors import UserError
    from trainer.checkpoint import folder

    run_dir = Path(args.run_dir)
    if (run_dir / folder.STATE).is_file():
        return _show([run_dir], [], [], args.verify)
    found, left, aside = folder.complete(run_dir), folder.unfinished(run_dir), folder.superseded(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such folder; give a run directory")
    if not found + left + aside:
        raise UserError(f"{run_dir}: holds no checkpoint; give a run directory")
    return _show(found, left, aside, args.verify)


def _show(found: list[Path], left: list[Path], aside: list[Path], verify: bool) -> int:
    from launch.show import console, table
    from trainer.checkpoint import manifest

    shown = table("step", "written", "size", "model", "layout", "state")
    damaged = {}
    for path in found:
        problems = manifest.damages(path, contents=verify)
        damaged.update({path / name: problem for name, problem in problems.items()})
        shown.add_row(*_facts(path), "damaged" if problems else "verified" if verify else "complete")
    for path in left:
        shown.add_row(*_facts(path), "not complete")
    for path in aside:
        shown.add_row(*_facts(path), "superseded")
    out = console()
    out.print(shown)
    for file, problem in damaged.items():
        out.print(f"{file}: {problem}", markup=False)
    return DAMAGED if damaged else 0


def _facts(checkpoint: Path) -> tuple[str, str, str, str, str]:
    """Step, date, size, model and layout, as far as the folder tells."""
    from trainer.checkpoint.folder import STATE
    from trainer.metrics.units import si

    digits = "".join(filter(str.isdigit, checkpoint.name))
    step = str(int(digits)) if "step-" in checkpoint.name and digits else ""
    size = si(sum(path.stat().st_size for path in checkpoint.rglob("*")), "B")
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
        written = datetime.fromtimestamp(state["saved"]).strftime("%Y-%m-%d %H:%M:%S")
        step = str(state["step"])
        model = f"{state['name']}, {si(state['parameters'])} parameters"
        if "imported" in state:
            return step, written, size, model, f"from {state['imported']}"
        axes = " × ".join(f"{axis} {length}" for axis, length in state["layout"].items() if length > 1)
        return step, written, size, model, axes or "1 process"
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return step, "", size, "", ""  # not written yet, damaged, or by release 0.1.0
