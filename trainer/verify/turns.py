"""On every rank: train one config under several layouts in turn, in one process group, and compare each as it ends.

``python -m trainer.verify.turns PLAN``, where PLAN is a :class:`Plan` as JSON. A launch costs seconds, most of them
imports; and a run that has been compared need not stay on the disk.
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from backends.errors import UserError
from parallel import topology
from trainer.config.load import load_config
from trainer.loop import Loop
from trainer.setup import prepare
from trainer.verify.difference import Difference, difference


@dataclass(frozen=True)
class Plan:
    """What some ranks do.

    Attributes:
        where: the config file.
        runs: run directory and overrides of each run.
        steps: of each.
        reference: the run directory that each is compared with, and removed then; None: they stay.
        outcomes: a file that gets a line of JSON for each run as it ends: its ``difference`` (null without a
            reference), or the ``error`` that a user can mend.
    """

    where: str
    runs: list[tuple[str, list[str]]]
    steps: int
    reference: Optional[str]
    outcomes: str


def train(plan: Plan) -> None:
    """Do it; every rank calls this."""
    for run_dir, overrides in plan.runs:
        outcome: dict[str, Any] = {"difference": None}
        try:
            config = load_config(plan.where, [*overrides, f"run_dir={run_dir}"])
            Loop(prepare(config, plan.where, resume=False)).train()
        except UserError as error:
            outcome = {"error": str(error)}
        if os.environ["RANK"] == "0":
            if plan.reference is not None and "error" not in outcome:
                found = difference(Path(plan.reference), Path(run_dir), plan.steps)
                outcome["difference"] = asdict(found)
                shutil.rmtree(run_dir)
            with open(plan.outcomes, "a", encoding="utf-8") as file:
                file.write(json.dumps(outcome) + "\n")


def outcomes(plan: Plan) -> list[Optional[Difference]]:
    """What :func:`train` has written so far; None for a run without a reference.

    Raises:
        UserError: a run ended with one.
    """
    path = Path(plan.outcomes)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    error = next((outcome["error"] for outcome in found if "error" in outcome), None)
    if error is not None:
        raise UserError(error)
    return [Difference(**outcome["difference"]) if outcome["difference"] else None for outcome in found]


def main() -> None:
    train(Plan(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    topology.stop()  # a gloo thread that still drops a tensor when the interpreter ends would abort the process


if __name__ == "__main__":
    main()
