"""On every rank: a run in miniature whose second rank goes its own way, as the argument says."""

import os
import sys
import time

import torch
import torch.distributed as dist

from backends.errors import UserError
from launch import train
from launch.errors import run
from parallel import agreement
from parallel.agreement import agree, together

RANK = int(os.environ["RANK"])


def command(way: str) -> int:
    with together():
        if way == "every rank lacks a file" or (way, RANK) in (("the second lacks a file", 1), ("the first does", 0)):
            raise UserError("data.paths: there is no file there; correct it")
        if way == "the first takes long":
            agreement._PATIENCE = 0.5
            if RANK == 1:
                raise UserError("data.paths: there is no file there; correct it")
            time.sleep(4)
        if (way, RANK) == ("the second has a bug", 1):
            raise KeyError("a bug")
        agree({"seed": 0, "train.steps": 30 if (way, RANK) == ("another value", 1) else 20})
        agree({"again": [1.5, None]})  # every agreement has keys of its own
        dist.init_process_group("gloo")
        try:
            if (way, RANK) == ("the second fails later", 1):
                raise UserError("checkpoint: is damaged; choose another")
            dist.all_reduce(torch.ones(1))
        finally:
            dist.destroy_process_group()
    return 0


def main() -> int:
    way, *arguments = sys.argv[1:]
    if way == "train":
        return train.main([*arguments, f"train.steps={20 + RANK}"])
    return run(lambda: command(way), debug=False)


if __name__ == "__main__":
    sys.exit(main())
