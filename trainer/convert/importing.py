"""From a folder in the Hugging Face format to a checkpoint: a file at a time, a block at a time."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

import tokenizers
import torch
from omegaconf import OmegaConf
from torch import Tensor

from backends.errors import UserError
from trainer.checkpoint import manifest
from trainer.checkpoint.flat import FlatRuns, Run
from trainer.checkpoint.folder import CONFIG, STATE, TOKENIZER, appearing
from trainer.checkpoint.part import join_parts, write_part
from trainer.checkpoint.ranges import BLOCK
from trainer.config.load import load_config
from trainer.convert import published
from trainer.convert.families import FAMILIES
from trainer.convert.family import Family
from trainer.convert.names import Slot, copies, slots
from trainer.convert.published import Published
from trainer.convert.settings import config_from
from trainer.model.config import ModelConfig

ORIGINAL = "published"  # in the checkpoint: config.json, and what else came with the weights


@dataclass
class Imported:
    """What to tell about an import."""

    family: str
    parameters: int
    notes: list[str] = field(default_factory=list)


def import_weights(source: Path, target: Path) -> Imported:
    """Make a checkpoint, with fp32 weights and without an optimizer's state, of published weights.

    Raises:
        UserError: ``target`` exists; a file of ``source`` is missing or damaged; its tensors are not those of the
            model that its config.json describes. ``target`` is not there then.
    """
    published.check_installed()
    with appearing(target) as hidden:
        found = Published(source)
        family = _family(found)
        config = config_from(found.config, family, str(source / published.CONFIG))
        notes = [_without_missing_mtp(found, config, family)]
        wanted = _checked(found, config, family)
        files, parameters = _write_weights(found, wanted, hidden)
        _hand_on(source, hidden)
        end, note = _end_of_document(found)
        notes.append(note)
        (hidden / CONFIG).write_text(_config(config, found, target, end))
        load_config(str(hidden / CONFIG), [])
        facts = {"name": target.name, "saved": int(time.time()), "parameters": parameters, "imported": family.name}
        (hidden / STATE).write_text(json.dumps({"step": 0, **facts}, indent=1))
        manifest.seal(hidden, files)
    return Imported(family.name, parameters, [note for note in notes if note])


def _family(found: Published) -> Family:
    kind = found.config.get("model_type")
    for family in FAMILIES.values():
        if kind in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES.values() for kind in family.model_types)
    raise UserError(f"{found.folder / published.CONFIG}: model_type: is {kind!r}; supported are {known}")


def _without_missing_mtp(found: Published, config: ModelConfig, family: Family) -> str:
    """Leave multi-token prediction out if no tensor of it is there: transformers drops it and keeps the key."""
    first = f"model.layers.{config.num_layers}."
    if not config.mtp_layers or any(name.startswith(first) for name in found.tensors):
        return ""
    config.mtp_layers = 0
    return f"{found.folder}: config.json has multi-token prediction, the files do not: imported without"


def _checked(found: Published, config: ModelConfig, family: Family) -> dict[str, Slot]:
    """All their tensors, every one of them there and of the right shape, and none besides."""
    wanted, repeated = slots(config, family), copies(config, family)
    for name, slot in wanted.items():
        if name not in found.tensors:
            raise UserError(f"{found.folder}: tensor {name} {list(slot.shape)} is missing; fetch the files again")
        _check_shape(found, name, slot.shape)
    for name, stored in found.tensors.items():
        if name in wanted or name.endswith(".rotary_emb.inv_freq"):  # computed; old files have it
            continue
        if name not in repeated:
            raise UserError(
                f"{found.folder / stored.file}: tensor {name} {list(stored.shape)} is not part of the model that "
                f"config.json describes; check {found.folder / published.CONFIG}"
            )
        _check_shape(found, name, wanted[repeated[name]].shape)
        both = zip(found.rows(name, BLOCK), found.rows(repeated[name], BLOCK), strict=True)
        if not all(torch.equal(one.float(), other.float()) for one, other in both):
            raise UserError(
                f"{found.folder / stored.file}: tensor {name} is not equal to {repeated[name]}, but our models have "
                "one weight for both; such weights cannot be imported"
            )
    return wanted


def _check_shape(found: Published, name: str, shape: tuple[int, ...]) -> None:
    stored = found.tensors[name]
    if stored.shape != shape:
        raise UserError(
            f"{found.folder / stored.file}: tensor {name} is {list(stored.shape)}, config.json says {list(shape)}; "
            f"check {found.folder / published.CONFIG}"
        )


def _write_weights(found: Published, wanted: dict[str, Slot], hidden: Path) -> tuple[dict[str, manifest.Entry], int]:
    by_file: dict[str, list[Slot]] = {}
    for name, slot in wanted.items():
        by_file.setdefault(found.tensors[name].file, []).append(slot)
    for number, (file, here) in enumerate(sorted(by_file.items())):
        with found.opened(file) as tensors:
            write_part(hidden, number, _pieces(here, tensors))
    return join_parts(hidden, len(by_file))


def _pieces(here: list[Slot], tensors: Any) -> dict[str, Tensor]:
    """What a file has of each of our tensors; read when it is written."""
    runs: dict[str, list[Run]] = {}
    whole = {place.key: place.whole for slot in here for place in slot.places}
    for slot in here:
        part = tensors.get_slice(slot.name)
        for key, offset, rows in _blocks(slot):
            count = (rows.stop - rows.start) * slot.row
            runs.setdefault(key, []).append(Run(offset, count, partial(_read, slot, part, rows)))
    return {key: FlatRuns.of_runs(found, whole[key], torch.float32) for key, found in runs.items()}


def _blocks(slot: Slot) -> Iterator[tuple[str, int, slice]]:
    """Our tensor, offset there, and rows of theirs that are a run of it; at most ``BLOCK`` elements, or one row."""
    step, row = max(1, BLOCK // slot.row), 0
    for place in slot.places:
        first, last = row, row + place.count // slot.row
        for row in range(first, last, step):
            yield place.key, place.offset + (row - first) * slot.row, slice(row, min(row + step, last))
        row = last


def _read(slot: Slot, part: Any, rows: slice) -> Tensor:
    return slot.to_ours(part[rows].float())


def _hand_on(source: Path, hidden: Path) -> None:
    """Keep what an export should have again, and the tokenizer where our checkpoints have theirs."""
    (hidden / ORIGINAL).mkdir()
    for path in published.companions(source):
        copyfile(path, hidden / ORIGINAL / path.name)
    if (source / published.TOKENIZER).is_file():
        copyfile(source / published.TOKENIZER, hidden / TOKENIZER)


def _end_of_document(found: Published) -> tuple[str | None, str]:
    """The token that closes a document, and what to say if there is a doubt."""
    path = found.folder / published.TOKENIZER
    if not path.is_file():
        return None, (
            f"{found.folder}: has no {published.TOKENIZER}: make one, with transformers' "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...), and set data.tokenizer.path to it"
        )
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: is no tokenizer that we can read ({error}); fetch it again") from None
    ends = found.config.get("eos_token_id")
    number = ends[0] if isinstance(ends, list) and ends else ends
    token = inner.id_to_token(number) if isinstance(number, int) and number >= 0 else None
    note = "" if token else f"{found.folder}: config.json names no end token: set data.tokenizer.end_of_document"
    return token, note


def _config(model: ModelConfig, found: Published, target: Path, end: str | None) -> str:
    """What training from these weights needs; the rest has defaults."""
    where = target.absolute()
    dtypes = {stored.dtype for stored in found.tensors.values() if len(stored.shape) > 1}
    tokenizer = {"path": str(where / TOKENIZER)} | ({"end_of_document": end} if end else {})
    keys = {
        "name": f"{target.name}-continued",
        "model": asdict(model),
        "data": {"tokenizer": tokenizer},
        "train": {"precision": "bf16" if dtypes == {torch.bfloat16} else "fp32"},
        "checkpoint": {"initial": str(where)},
    }
    return OmegaConf.to_yaml(OmegaConf.create(keys))
