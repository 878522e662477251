"""Command-line arguments that several commands share."""

import argparse
import importlib
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from keyword import iskeyword
from pathlib import Path
from typing import NoReturn

from launch.errors import USER_ERROR, complain, written


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message}; see `{self.prog} --help`")
        raise SystemExit(USER_ERROR)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(written(status), message)


def choose(
    prog: str, description: str, commands: Mapping[str, str], epilog: str, package: str, argv: list[str], **more: str
) -> int:
    """Run ``<prog> <command> ...``; each is the ``main(argv)`` of the module of its name in ``package``.

    A command that is a keyword of Python is the module with ``_`` behind its name. Without a command this prints help.

    Args:
        commands: what each does.
        epilog: follows their list in the help.
        more: flags that print a text and end, and their texts.
    """
    listed = "\n".join(f"  {name:<13}{what}" for name, what in commands.items())
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f"commands:\n{listed}\n\n{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, text in more.items():
        parser.add_argument(f"--{flag}", action="version", version=text)
    parser.add_argument("command", metavar="command", choices=commands, help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments")
    if not argv:
        parser.print_help()
        return USER_ERROR
    chosen = parser.parse_args(argv)
    module = f"{chosen.command}_" if iskeyword(chosen.command) else chosen.command
    return importlib.import_module(f"{package}.{module}").main(chosen.arguments)


class KeysParser(Parser):
    """Takes ``key=value`` overrides, anywhere; ``--help`` goes on with the keys.

    Args:
        keys: gives those that it takes; None: every key.
    """

    def __init__(self, prog: str, description: str, keys: Callable[[], Collection[str]] | None = None) -> None:
        super().__init__(prog=prog, description=description)
        self._keys = keys
        self.add_argument("overrides", metavar="key=value", nargs="*", help="overrides a key of the config")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments; exits with one line, which has the right spelling where that can be guessed."""
        checked = []
        for index, argument in enumerate(arguments):
            before, following = "".join(arguments[index - 1 : index]), "".join(arguments[index + 1 : index + 2])
            self._check_spelling(before, argument, following)
            flag = self._option_string_actions.get(argument)
            # An override is never the value that a flag may have.
            checked.append(f"{argument}=" if flag and flag.nargs == "?" and "=" in following else argument)
        return self.parse_intermixed_args(checked)

    def _check_spelling(self, before: str, argument: str, following: str) -> None:
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-"):
            if f"--{name}" not in self._option_string_actions and _is_key(name):
                self.error(f"'{argument}' is a key, not a flag; write {name}={value if equals else following}")
        elif not equals and argument.endswith((".yaml", ".yml")) and "--config" in self._option_string_actions:
            flag = self._option_string_actions.get(before)
            if flag is None or flag.nargs == 0:
                self.error(f"'{argument}' stands alone; write --config {argument}")

    def format_help(self) -> str:
        from trainer.config.help import config_help  # only --help needs it

        width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120) - 2)
        return f"{super().format_help()}\n{config_help(width, self._keys() if self._keys else None)}\n"


class ConfigParser(KeysParser):
    """Takes ``--config PATH`` as well."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description)
        self.add_argument("--config", metavar="PATH", required=True, help="the YAML file of the run")


def _is_key(name: str) -> bool:
    from trainer.config.schema import Config  # only a mistake needs it

    return name.partition(".")[0] in Config.__dataclass_fields__


DRY_RUN = ("world_size", "rank", "imbalance", "json")  # arguments that only a dry run takes


def add_checkpoint(parser: Parser) -> None:
    """``--run`` or ``--checkpoint``, ``--backend`` and ``--debug``: for commands that run a trained model."""
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--run", metavar="RUN_DIR", help="a run directory; its newest checkpoint is used")
    place.add_argument("--checkpoint", metavar="DIR", help="one checkpoint directory")
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda", "ascend"), default="auto", help="where it runs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks instead of one line")


def count(text: str) -> int:
    """The type of an argument that counts something."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return value


def checkpoint_place(args: argparse.Namespace) -> str:
    """The folder that ``--run`` or ``--checkpoint`` names. Raises UserError, without torch, if there is none."""
    from backends.errors import UserError

    place = args.run or args.checkpoint
    if not Path(place).is_dir():
        raise UserError(f"{place}: there is no such folder; give a run directory, or a folder inside its checkpoints/")
    if sys.stderr.isatty():
        print(f"loading {place} ...", file=sys.stderr, flush=True)
    return place


def train_parser(prog: str = "moebius train") -> ConfigParser:
    """The arguments of training.

    Gives ``config``, ``overrides``, ``resume`` (False, True or the path of a checkpoint), ``auto_resume``, ``sample``,
    ``debug`` and ``local_rank``; for a dry run ``dry_run``, ``world_size``, ``rank``, ``imbalance`` and ``json``.
    """
    parser = ConfigParser(prog, "Train a model. Several ranks: deepspeed --num_accelerators N launch/train.py ...")
    parser.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        nargs="?",
        default=False,
        const=True,
        type=lambda path: path or True,
        help="go on with the run, from its newest checkpoint or from the folder of an earlier one",
    )
    parser.add_argument(
        "--auto-resume", action="store_true", help="for supervisors: --resume if there is a checkpoint, else a new run"
    )
    parser.add_argument("--sample", action="store_true", help="print text from the model when training ends")
    parser.add_argument("--debug", action="store_true", help="show tracebacks instead of one line")
    dry = parser.add_argument_group("dry run", "what one rank would hold and send; needs neither data nor other ranks")
    dry.add_argument("--dry-run", action="store_true", help="predict memory and communication, and train nothing")
    dry.add_argument("--world-size", metavar="N", type=int, help="ranks of the whole job (1)")
    dry.add_argument("--rank", metavar="R", type=int, help="the rank to predict (0)")
    dry.add_argument("--imbalance", metavar="F", type=float, help="its experts get F times their share of tokens (1)")
    dry.add_argument("--json", action="store_true", default=None, help="print JSON")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by deepspeed
    return parser
