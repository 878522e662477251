"""A folder that many processes want and exactly one builds."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from backends.errors import UserError


def build_once(folder: Path, build: Callable[[Path], None], where: str) -> Path:
    """Return ``folder``, having filled it unless it exists.

    ``build`` is given a temporary folder beside it, which becomes ``folder`` by one rename: nobody ever sees half of
    it. Processes that come together wait for the one that builds; if that one dies, the next takes over.

    Args:
        folder: what is wanted; its name must tell everything that its content depends on.
        build: fills the folder that it is given.
        where: the config file, for messages.

    Raises:
        UserError: if data.cache_dir cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():
                return folder
            for left_over in folder.parent.glob(f"{folder.name}.partial-*"):  # of a builder that was killed
                shutil.rmtree(left_over)
            partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
            partial.mkdir()
            try:
                build(partial)
                try:
                    os.rename(partial, folder)
                except OSError:
                    if not folder.is_dir():  # else another was faster, on a file system whose locks do nothing
                        raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{where}: data.cache_dir: cannot write '{folder.parent}' ({error.strerror or error}); choose a folder "
            "that can be written and has room"
        ) from error
    return folder


def cache_folder(cache_dir: str, kind: str, name: str) -> Path:
    """``<cache_dir>/<kind>/<name>``, with ~ expanded."""
    return Path(cache_dir).expanduser() / kind / name
