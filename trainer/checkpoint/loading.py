"""Reading a checkpoint into whatever layout this run has."""

import json
import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from backends.errors import UserError
from parallel.engine import Engine
from trainer.checkpoint import manifest
from trainer.checkpoint.flat import FlatRuns
from trainer.checkpoint.folder import CONFIG, STATE
from trainer.checkpoint.manifest import INSTEAD
from trainer.checkpoint.ranges import RangeReader
from trainer.checkpoint.tensors import initial, random_name, to_load, weights
from trainer.checkpoint.together import together
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.model import MoETransformer


def load(checkpoint: Path, model: MoETransformer, engine: Engine, config: Config, where: str) -> dict[str, Any]:
    """Overwrite weights, optimizer and random state with a checkpoint's; return the loop's state.

    Any layout loads what any other saved. Every rank calls this.

    Raises:
        UserError: it is of another model, or damaged; on every rank.
    """
    state = together(lambda: _fill(checkpoint, model, engine, config, where))
    engine.loaded(int(state["step"]))  # has collectives of its own: not before every rank has read its part
    return state


def _fill(checkpoint: Path, model: MoETransformer, engine: Engine, config: Config, where: str) -> dict[str, Any]:
    manifest.check_sizes(checkpoint)
    check_same_model(checkpoint, config, where)
    state = _read_state(checkpoint)
    if "data" not in state:
        raise UserError(f"{checkpoint}: holds weights only; start a new run from it with checkpoint.initial")
    tensors = to_load(model, engine)
    random = random_name()
    if random not in _metadata(checkpoint):
        del tensors[random]  # more ranks than were saved: these keep their fresh state
    read(checkpoint, tensors)
    if random in tensors:
        torch.set_rng_state(tensors[random])
    return state


def load_initial(checkpoint: Path, model: MoETransformer, engine: Engine, config: Config, where: str) -> None:
    """Overwrite the initial weights, and buffers, of a new run with those of a checkpoint of any run, or imported.

    Every rank calls this and reads what it holds.

    Raises:
        UserError: it is of another model, or damaged; on every rank.
    """

    def fill() -> None:
        manifest.check_sizes(checkpoint, _ANEW)
        remedy = f"use the model of {checkpoint / CONFIG}"
        check_same_model(checkpoint, config, f"{where}: checkpoint.initial", remedy, _PRECISION)
        read(checkpoint, initial(model, engine), _ANEW)

    together(fill)
    engine.loaded(0)


def load_weights(checkpoint: Path, model: MoETransformer) -> None:
    """Fill a whole model, with weights of any dtype, from the fp32 master weights: for inference on one process.

    Raises:
        UserError: the checkpoint is damaged.
    """
    manifest.check_sizes(checkpoint)
    read(checkpoint, weights(model))


def check_same_model(
    checkpoint: Path,
    config: Config,
    where: str,
    remedy: str = "use the config it was trained with, or another run_dir",
    more_free: Set[str] = frozenset(),
) -> None:
    """Raise a :class:`UserError` naming the first key of ``model`` in which the checkpoint's config differs.

    Args:
        more_free: keys that may differ besides the weights of losses.
    """
    saved = load_config(str(checkpoint / CONFIG), [])
    difference = _first_difference(saved.model, config.model, "model", _FREE | more_free)
    if difference:
        key, theirs, ours = difference
        raise UserError(
            f"{where}: {key}: is {ours}, but the checkpoint {checkpoint} is of a model with {theirs}; {remedy}"
        )


# Keys of the model that may change between runs: they weigh losses and shape nothing.
_FREE = {"aux_loss", "z_loss", "mtp_loss", "expert_bias_rate", "capacity_factor", "init_std"}
_PRECISION = {"residual_fp32"}  # a new run may choose it anew
_ANEW = "import or copy it again"


def _first_difference(theirs: Any, ours: Any, key: str, free: Set[str]) -> tuple[str, Any, Any] | None:
    if not hasattr(ours, "__dataclass_fields__"):
        return (key, theirs, ours) if theirs != ours else None
    for name in ours.__dataclass_fields__:
        if name not in free:
            found = _first_difference(getattr(theirs, name), getattr(ours, name), f"{key}.{name}", free)
            if found:
                return found
    return None


def _metadata(checkpoint: Path, instead: str = INSTEAD) -> dict[str, Any]:
    try:
        return dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # pickle raises anything at all on a damaged file
        raise UserError(f"{checkpoint}/.metadata: cannot be read ({type(error).__name__}); {instead}") from error


def read(checkpoint: Path, tensors: dict[str, Tensor], instead: str = INSTEAD) -> None:
    """Fill tensors, pieces of flat ones, and what the runs of others give.

    Raises:
        UserError: one is missing or of another size, or the checkpoint is damaged.
    """
    saved = _metadata(checkpoint, instead)
    for name, tensor in tensors.items():
        size = [tensor.whole] if isinstance(tensor, FlatRuns) else list(tensor.shape)
        if name not in saved or list(saved[name].size) != size:
            has = f"has {list(saved[name].size)}" if name in saved else "is missing"
            raise UserError(
                f"{checkpoint}: tensor {name} {has}, the model needs {size}; use the config it was trained with"
            )
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=RangeReader(checkpoint), planner=DefaultLoadPlanner(), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        said = str(cause).partition("\n")[0][:100] or type(cause).__name__
        raise UserError(f"{checkpoint}: is damaged ({said}); {instead}") from error


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}/{STATE}: cannot be read ({error}); {INSTEAD}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns whenever it is used without its collectives."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
