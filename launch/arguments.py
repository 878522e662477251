"""Command-line arguments that several commands share."""

import argparse
import shutil
from typing import NoReturn

from launch.errors import USER_ERROR, complain, written


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message}; see `{self.prog} --help`")
        raise SystemExit(USER_ERROR)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(written(status), message)


class ConfigParser(Parser):
    """Takes ``--config PATH`` and ``key=value`` overrides; ``--help`` goes on with every key."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description)
        self.add_argument("--config", metavar="PATH", required=True, help="the YAML file of the run")
        self.add_argument("overrides", metavar="key=value", nargs="*", help="overrides a key of the file")

    def format_help(self) -> str:
        from trainer.config.help import config_help  # only --help needs it

        width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120) - 2)
        return f"{super().format_help()}\n{config_help(width)}\n"


def train_parser(prog: str = "moebius train") -> ConfigParser:
    """The arguments of training; parse with ``parse_intermixed_args``, so that overrides may stand anywhere.

    Gives ``config``, ``overrides``, ``resume``, ``auto_resume``, ``sample``, ``debug`` and ``local_rank``.
    """
    parser = ConfigParser(prog, "Train a model. Several ranks: deepspeed --num_accelerators N launch/train.py ...")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run directory")
    parser.add_argument(
        "--auto-resume", action="store_true", help="for supervisors: --resume if there is a checkpoint, else a new run"
    )
    parser.add_argument("--sample", action="store_true", help="print text from the model when training ends")
    parser.add_argument("--debug", action="store_true", help="show tracebacks instead of one line")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by deepspeed
    return parser
