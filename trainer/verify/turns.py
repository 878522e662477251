"""On every rank: train one config under several layouts in turn, in one process group.

``python -m trainer.verify.turns PLAN``, where PLAN is a :class:`Plan` as JSON. Starting a process costs seconds, most
of them imports.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from backends.errors import UserError
from parallel import topology
from trainer.config.load import load_config
from trainer.loop import Loop
from trainer.setup import prepare


@dataclass(frozen=True)
class Plan:
    """What some ranks do.

    Attributes:
        where: the config file.
        runs: run directory and overrides of each run.
        ended: a file that gets a line for each run as it ends: empty, or what a user has to mend.
    """

    where: str
    runs: list[tuple[str, list[str]]]
    ended: str


def train(plan: Plan) -> None:
    """Do it; every rank calls this. It ends with the first run that cannot be had."""
    for run_dir, overrides in plan.runs:
        problem = ""
        try:
            config = load_config(plan.where, [*overrides, f"run_dir={run_dir}"])
            Loop(prepare(config, plan.where, resume=False)).train()
        except UserError as error:
            problem = " ".join(str(error).split())
        if os.environ["RANK"] == "0":
            with open(plan.ended, "a", encoding="utf-8") as file:
                file.write(problem + "\n")
        if problem:
            return


def count_ended(plan: Plan) -> int:
    """How many of its runs have ended.

    Raises:
        UserError: one cannot be had.
    """
    path = Path(plan.ended)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # one may be half written
    for problem in lines:
        if problem:
            raise UserError(problem)
    return len(lines)


def main() -> None:
    """As the module's first lines say."""
    train(Plan(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    topology.stop()  # a gloo thread that still drops a tensor when the interpreter ends would abort the process


if __name__ == "__main__":
    main()
