"""A folder in the Hugging Face format that is read: config.json, safetensors files, and what comes with them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.errors import UserError
from trainer.checkpoint.folder import FOLDER, STATE

if TYPE_CHECKING:  # a mistake in the command line is found without it
    import torch
    from torch import Tensor

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
# What comes with the weights, and is handed on as it is; code too, which some families need in transformers.
_COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "LICENSE",
    "*.py",
)
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTISED = ("_scale_inv", "_scales", "_blocks", ".qweight", ".weight_scale", ".weight_packed")


@dataclass(frozen=True)
class Stored:
    """One tensor: its file, shape and dtype."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])


def check_installed() -> None:
    """Raise a :class:`UserError` if the library of the format is not there: it comes with an extra of ours."""
    if find_spec("safetensors") is None:
        raise UserError("safetensors: is not installed; install it with pip install safetensors")


def check_folder(folder: Path) -> None:
    """Raise a :class:`UserError` if this can be no folder of published weights. Needs no torch."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give one with config.json and safetensors files")
    if (folder / STATE).is_file() or (folder / FOLDER).is_dir():
        remedy = "generate, eval, export and checkpoint.initial take it as it is"
        raise UserError(f"{folder}: is a checkpoint or run directory of moebius already; {remedy}")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG}: cannot be read (No such file or directory); fetch it again")


def companions(folder: Path) -> list[Path]:
    """What comes with the weights, besides tokenizer.json."""
    return sorted(path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file())


class Published:
    """The folder; its tensors are listed when it is made, and read when they are asked for.

    Raises:
        UserError: files are missing or damaged, or hold no plain floating-point numbers.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self.folder = folder
        self.config = self.json(CONFIG)
        self.tensors: dict[str, Stored] = {}
        for file in self._files():
            self._list(file)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, which must hold an object."""
        path = self.folder / name
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"{path}: cannot be read ({reason}); fetch it again") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds no object; fetch it again")
        return content

    @contextmanager
    def opened(self, file: str) -> Iterator[Any]:
        """A file of the folder, as safetensors opens it."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as tensors:
                yield tensors
        except (OSError, SafetensorError) as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "is missing" if missing else f"is damaged ({str(error).splitlines()[0]})"
            raise UserError(f"{path}: {reason}; fetch it again") from None

    def rows(self, name: str, size: int) -> Iterator[Tensor]:
        """A tensor, at most ``size`` elements at a time, or one row if it has more."""
        stored = self.tensors[name]
        with self.opened(stored.file) as tensors:
            part = tensors.get_slice(name)
            step = max(1, size // max(1, stored.row))
            for first in range(0, stored.shape[0], step):
                yield part[first : first + step]

    def _files(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            listed = self.json(INDEX).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
                raise UserError(f"{self.folder / INDEX}: has no weight_map; fetch it again")
            return sorted(set(listed.values()))
        if not (self.folder / WEIGHTS).is_file():
            raise UserError(f"{self.folder}: has neither {WEIGHTS} nor {INDEX}; save it with safetensors first")
        return [WEIGHTS]

    def _list(self, file: str) -> None:
        import torch

        with self.opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                where = f"{self.folder / file}: {name}"
                if name.endswith(_QUANTISED):
                    raise UserError(f"{where}: belongs to quantised weights; convert them to bf16 first")
                if name in self.tensors:
                    raise UserError(f"{where}: is in {self.tensors[name].file} as well; fetch the files again")
                if part.get_dtype() not in _FLOATS:
                    raise UserError(f"{where}: is {part.get_dtype()}; convert it to bf16 first")
                self.tensors[name] = Stored(file, tuple(part.get_shape()), getattr(torch, _FLOATS[part.get_dtype()]))
