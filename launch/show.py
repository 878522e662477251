"""What people see: tables, in colour and fitted to the terminal, plain in a file or pipe; and what takes a while."""

import logging
import sys

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Standard output; wide where nobody's terminal limits it."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)


def table(*columns: str, numbers: int = 0) -> Table:
    """A table without lines, whose last ``numbers`` columns are aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index >= len(columns) - numbers else "left", overflow="fold")
    return made


def announce(package: str = "trainer.data") -> None:
    """Say on standard error what takes a while: a package's messages, as the one process that does it writes them.

    Those of `trainer.data` are about the first start.
    """
    logger = logging.getLogger(package)
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler()]
