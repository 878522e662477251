"""The checkpoints of a run: written whole or not at all, found, checked and thinned out.

``RUN_DIR/checkpoints/step-000200/`` holds the DCP files, ``trainer.json``, the config and the tokenizer. The folder
is written under another name and renamed when everything is in it: a folder of that name is complete, and the
newest is the one with the highest step. There is no pointer file that could be wrong.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from backends.errors import UserError
from parallel.engine import Engine
from trainer.checkpoint.flat import FlatPiece
from trainer.config.load import dump_config, load_config
from trainer.config.schema import Config
from trainer.data.tokenizer import Tokenizer
from trainer.model import MoETransformer

FOLDER, STATE, CONFIG, TOKENIZER = "checkpoints", "trainer.json", "config.yaml", "tokenizer.json"
_OTHER = "delete this folder, and the checkpoint before it is the newest"
_NAME = re.compile(r"step-(\d{6,})")


def newest(run_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, if there is one."""
    found = _complete(Path(run_dir))
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which it was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, "checkpoint folders are named by their step"
    return int(match[1])


def _complete(run_dir: Path) -> list[Path]:
    folder = run_dir / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def save(
    run_dir: str | Path,
    step: int,
    model: MoETransformer,
    engine: Engine,
    state: dict[str, Any],
    config: Config,
    tokenizer: Tokenizer,
) -> Path:
    """Write a checkpoint; every rank calls this with the same arguments but its own shards.

    Args:
        state: JSON-serialisable state of the loop, the same on every rank.

    Returns:
        its folder, complete on return on every rank.
    """
    folder = Path(run_dir) / FOLDER
    final, partial = folder / f"step-{step:06d}", folder / f".step-{step:06d}.partial"
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)  # from a save that was interrupted
        partial.mkdir(parents=True)
    dist.barrier()
    with _quiet():
        dcp.save(_tensors(model, engine), checkpoint_id=partial, no_dist=_alone())
    if is_main:
        (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
        (partial / CONFIG).write_text(dump_config(config))
        tokenizer.save(partial / TOKENIZER)
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)  # the same step of the same run, saved again after a resume
        os.rename(partial, final)
        _sync(folder)
        _thin_out(Path(run_dir), config.checkpoint.keep)
    dist.barrier()
    return final


def _sync(folder: Path) -> None:
    """Have the disk hold what the folder lists, before a rename says so."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _thin_out(run_dir: Path, keep: int) -> None:
    for path in _complete(run_dir)[:-keep] if keep else []:
        doomed = path.with_name(f".{path.name}.deleted")
        os.rename(path, doomed)  # at no moment does a folder of a checkpoint's name miss files
        shutil.rmtree(doomed, ignore_errors=True)


def _tensors(model: MoETransformer, engine: Engine) -> dict[str, Tensor]:
    """Full name to piece: master weights, AdamW moments, buffers, and each rank's random state."""
    tensors: dict[str, Tensor] = {f"rng.{dist.get_rank()}": torch.get_rng_state()}
    for shard in engine.shards():
        for kind, values in shard.state.items():
            tensors[f"{kind}.{shard.name}"] = FlatPiece.of(values, shard.offset, shard.whole)
    tensors.update({f"buffer.{name}": buffer for name, buffer in model.named_buffers()})
    return tensors


def load(checkpoint: Path, model: MoETransformer, engine: Engine, config: Config, where: str) -> dict[str, Any]:
    """Overwrite weights, optimizer and random state with a checkpoint's; return the loop's state.

    Any layout loads what any other saved.

    Raises:
        UserError: it is of another model, or damaged.
    """
    check_same_model(checkpoint, config, where)
    state = _read_state(checkpoint)
    tensors = _tensors(model, engine)
    random = f"rng.{dist.get_rank()}"
    if random not in _metadata(checkpoint):
        del tensors[random]  # more ranks than were saved: these keep their fresh state
    _read(checkpoint, tensors)
    if random in tensors:
        torch.set_rng_state(tensors[random])
    engine.loaded(int(state["step"]))
    return state


def load_weights(checkpoint: Path, model: MoETransformer) -> None:
    """Fill a whole model, with weights of any dtype, from the fp32 master weights: for inference on one process.

    Raises:
        UserError: the checkpoint is damaged.
    """
    tensors: dict[str, Tensor] = {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        tensors[f"weight.{name}"] = FlatPiece.of(flat, 0, flat.numel())
    _read(checkpoint, tensors)


def check_same_model(checkpoint: Path, config: Config, where: str) -> None:
    """Raise a :class:`UserError` naming the first key of ``model`` in which the checkpoint's config differs."""
    saved = load_config(str(checkpoint / CONFIG), [])
    difference = _first_difference(saved.model, config.model, "model")
    if difference:
        key, theirs, ours = difference
        raise UserError(
            f"{where}: {key}: is {ours}, but the checkpoint {checkpoint} is of a model with {theirs}; "
            "use the config it was trained with, or another run_dir"
        )


# Keys of the model that may change between runs: they weigh losses and shape nothing.
_FREE = {"aux_loss", "z_loss", "mtp_loss", "expert_bias_rate", "capacity_factor", "init_std"}


def _first_difference(theirs: Any, ours: Any, key: str) -> tuple[str, Any, Any] | None:
    if not hasattr(ours, "__dataclass_fields__"):
        return (key, theirs, ours) if theirs != ours else None
    for name in ours.__dataclass_fields__:
        if name not in _FREE:
            found = _first_difference(getattr(theirs, name), getattr(ours, name), f"{key}.{name}")
            if found:
                return found
    return None


def _metadata(checkpoint: Path) -> dict[str, Any]:
    try:
        return dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # pickle raises anything at all on a damaged file
        raise UserError(f"{checkpoint}/.metadata: cannot be read ({type(error).__name__}); {_OTHER}") from error


def _alone() -> bool:
    """Whether no other rank takes part; DCP then makes no collective.

    That is more than a saving: a gloo thread that copies a large object starts an OpenMP pool of its own, and with
    more pool threads than cores libgomp stops spinning at barriers for the rest of the process (a step of two
    threads took 1.2 s instead of 0.45 s after the first checkpoint).
    """
    return not dist.is_initialized() or dist.get_world_size() == 1


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns whenever a single process saves or loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _read(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    saved = _metadata(checkpoint)
    for name, tensor in tensors.items():
        size = [tensor.whole] if isinstance(tensor, FlatPiece) else list(tensor.shape)
        if name not in saved or list(saved[name].size) != size:
            has = f"has {list(saved[name].size)}" if name in saved else "is missing"
            raise UserError(
                f"{checkpoint}: tensor {name} {has}, the model needs {size}; use the config it was trained with"
            )
    try:
        with _quiet():
            dcp.load(tensors, checkpoint_id=checkpoint, planner=DefaultLoadPlanner(), no_dist=_alone())
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        said = str(cause).partition("\n")[0][:100] or type(cause).__name__
        raise UserError(f"{checkpoint}: is damaged ({said}); {_OTHER}") from error


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}/{STATE}: cannot be read ({error}); {_OTHER}") from error
