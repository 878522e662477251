"""From a checkpoint to a folder in the Hugging Face format: a file at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import manifest
from trainer.checkpoint.flat import FlatRuns, Run
from trainer.checkpoint.folder import CONFIG, TOKENIZER, appearing, located, sync
from trainer.checkpoint.loading import read
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.convert import published
from trainer.convert.families import FAMILIES
from trainer.convert.family import Family
from trainer.convert.importing import ORIGINAL
from trainer.convert.names import Slot, copies, slots
from trainer.convert.settings import config_to, family_of
from trainer.data.tokenizer import saved_tokenizer
from trainer.precision import weights_dtype

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # as config.json calls them


@dataclass(frozen=True)
class Exported:
    """What to tell about an export."""

    family: str
    dtype: str
    files: int


def export_weights(
    place: str | Path, target: Path, precision: str | None, family: str | None, file_bytes: int
) -> Exported:
    """Write the model of a checkpoint as published weights.

    Args:
        place: a checkpoint folder, or a run directory, whose newest one is taken.
        precision: "fp32" or "bf16"; None: what the model was trained in.
        family: one of ``FAMILIES``; None: the one that the weights came from, or else the first that has such models.
        file_bytes: largest file, unless a tensor is larger.

    Raises:
        UserError: there is no whole checkpoint; ``target`` exists; the family has no such models.
    """
    published.check_installed()
    checkpoint = located(place)
    with appearing(target) as hidden:
        manifest.check_sizes(checkpoint)
        config = load_config(str(checkpoint / CONFIG), [])
        original = _original(checkpoint, config)
        found = _family(checkpoint, config, family, original)
        keys = config_to(config.model, found, str(checkpoint / CONFIG))
        dtype = weights_dtype(precision or config.train.precision)
        files = list(_files(_tensors(config, found), dtype, file_bytes))
        names: dict[str, str] = {}
        for number, here in enumerate(files, 1):
            name = published.WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            _write(checkpoint, hidden / name, here, dtype)
            names |= {slot.name: name for slot in here}
        if len(files) > 1:
            size = sum(_bytes(slot, dtype) for here in files for slot in here)
            _json(hidden / published.INDEX, {"metadata": {"total_size": size}, "weight_map": names})
        _hand_on(checkpoint, hidden, original, config, found, keys, dtype)
        for path in hidden.iterdir():
            sync(path)
    return Exported(found.name, _DTYPES[dtype], len(files))


def _original(checkpoint: Path, config: Config) -> Path | None:
    """What came with the weights: in the checkpoint that they were imported into."""
    places = (checkpoint, config.checkpoint.initial and Path(config.checkpoint.initial))
    return next((place / ORIGINAL for place in places if place and (place / ORIGINAL).is_dir()), None)


def _family(checkpoint: Path, config: Config, name: str | None, original: Path | None) -> Family:
    if name is None and original is not None:
        kind = json.loads((original / published.CONFIG).read_text())["model_type"]
        return next(family for family in FAMILIES.values() if kind in family.model_types)
    return FAMILIES[name] if name else family_of(config.model, FAMILIES, str(checkpoint / CONFIG))


def _tensors(config: Config, family: Family) -> Iterator[Slot]:
    """All that a published folder holds, copies too."""
    mine = slots(config.model, family)
    yield from mine.values()
    for name, of in copies(config.model, family).items():
        if name not in family.top.values():
            yield replace(mine[of], name=name)


def _files(tensors: Iterator[Slot], dtype: torch.dtype, largest: int) -> Iterator[list[Slot]]:
    here: list[Slot] = []
    size = 0
    for slot in tensors:
        if here and size + _bytes(slot, dtype) > largest:
            yield here
            here, size = [], 0
        here.append(slot)
        size += _bytes(slot, dtype)
    yield here


def _bytes(slot: Slot, dtype: torch.dtype) -> int:
    return slot.numel * (torch.float32 if slot.always_fp32 else dtype).itemsize


def _write(checkpoint: Path, path: Path, here: list[Slot], dtype: torch.dtype) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    values = {slot.name: torch.empty(slot.numel, dtype=torch.float32 if slot.always_fp32 else dtype) for slot in here}
    read(checkpoint, _pieces(here, values))
    for slot in here:  # one by one: another order of elements takes memory of its own
        values[slot.name] = slot.to_theirs(values[slot.name])
    path.touch()
    mode = path.stat().st_mode  # safetensors makes files that only their owner may read
    try:
        save_file(values, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    path.chmod(mode)


def _pieces(here: list[Slot], values: dict[str, Tensor]) -> dict[str, Tensor]:
    runs: dict[str, list[Run]] = {}
    whole = {place.key: place.whole for slot in here for place in slot.places}
    for slot in here:
        first = 0
        for place in slot.places:
            part = values[slot.name][first : first + place.count]
            runs.setdefault(place.key, []).append(Run(place.offset, place.count, lambda part=part: part))  # type: ignore[misc]
            first += place.count
    return {key: FlatRuns.of_runs(found, whole[key], torch.float32) for key, found in runs.items()}


def _hand_on(
    checkpoint: Path,
    hidden: Path,
    original: Path | None,
    config: Config,
    family: Family,
    keys: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """config.json, the tokenizer, and what else came with the weights."""
    theirs = json.loads((original / published.CONFIG).read_text()) if original else {}
    for gone in ("rope_parameters", "dtype", "quantization_config", "transformers_version"):
        theirs.pop(gone, None)
    if theirs.get("model_type") in family.model_types:
        keys = keys | {"model_type": theirs["model_type"], "architectures": theirs.get("architectures")}
    if original:
        for path in published.companions(original):
            copyfile(path, hidden / path.name)
    yarn = config.model.rope.yarn
    positions = int(yarn.original_max_position * yarn.factor) if yarn.factor > 1 else config.data.sequence_length
    defaults: dict[str, Any] = {"max_position_embeddings": positions}
    if (checkpoint / TOKENIZER).is_file():
        copyfile(checkpoint / TOKENIZER, hidden / published.TOKENIZER)
        end = config.data.tokenizer.end_of_document
        if not original:
            number = saved_tokenizer(checkpoint / TOKENIZER, end).end_of_document
            defaults |= {"bos_token_id": None, "eos_token_id": number, "pad_token_id": None}
            _json(hidden / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
    _json(hidden / published.CONFIG, {**defaults, **theirs, **keys, "torch_dtype": _DTYPES[dtype]})


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
