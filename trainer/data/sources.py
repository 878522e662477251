"""From a :class:`DataConfig` to its training and its validation documents."""

import os
from itertools import islice

from backends.errors import UserError
from trainer.config.schema import DataConfig
from trainer.data.documents import Documents, Source
from trainer.data.files import FileSource, find_files, stdlib_files
from trainer.data.formats import read_jsonl, read_parquet, read_text, read_text_leniently
from trainer.data.hub import HubSource


def training_documents(config: DataConfig, where: str) -> Documents:
    """All documents of ``data.paths``, less those held out when there are no ``data.validation_paths``.

    Args:
        config: the `data` section.
        where: the config file, for messages.

    Raises:
        UserError: for a path, dataset or fraction that cannot work.
    """
    source = _source(config, where)
    if config.validation_paths:
        return Documents(source)
    return Documents(source, _fraction(config, where), held_out=False)


def validation_documents(config: DataConfig, where: str) -> Documents:
    """The documents of ``data.validation_paths`` (for a hub dataset: another split of it), or the held-out ones.

    Held out are the documents whose name hashes below ``data.validation_fraction``, whatever the seed or layout; of
    a few documents at least one, but not all.
    Raises UserError like :func:`training_documents`, and if a validation file is a training file too.
    """
    if not config.validation_paths:
        return Documents(_source(config, where), _fraction(config, where), held_out=True)
    return Documents(_validation_source(config, where))


def all_documents(config: DataConfig, where: str) -> Documents:
    """The documents of ``data.paths``, none held out. Raises UserError like :func:`training_documents`."""
    return Documents(_source(config, where))


def name_of(held_out: bool | None) -> str:
    """A half of the corpus in a word; None is all of it."""
    return {True: "validation", False: "training", None: "given"}[held_out]


def require_documents(count: int, held_out: bool | None, config: DataConfig, where: str) -> None:
    """Raise UserError if a half of the corpus (None: all of it) came out with ``count`` = 0 documents."""
    if count:
        return
    if config.validation_paths or held_out is None:
        key = "validation_paths" if held_out else "paths"
        raise UserError(f"{where}: data.{key}: hold no document; give files with text in them")
    if len(list(islice(_source(config, where).open(), 2))) < 2:
        raise UserError(
            f"{where}: data.paths: hold fewer than two documents, one to train on and one to hold out; give more of "
            "them, or name held-out files in data.validation_paths"
        )
    half, remedy = name_of(held_out), "raise" if held_out else "lower"
    raise UserError(
        f"{where}: data.validation_fraction: {config.validation_fraction:g} leaves no {half} document; {remedy} it, "
        "or name held-out files in data.validation_paths"
    )


def too_short(what: str, held_out: bool | None, config: DataConfig, where: str) -> UserError:
    """The error of a half of the corpus, ``what``, that does not fill one sequence."""
    fraction = "raise data.validation_fraction, " if held_out and not config.validation_paths else ""
    return UserError(
        f"{where}: data.sequence_length: the {what} do not fill one sequence of {config.sequence_length} tokens and "
        f"the next; lower it, {fraction}or give more text"
    )


def _source(config: DataConfig, where: str) -> Source:
    if config.source == "stdlib":
        if config.paths:
            raise UserError(
                f"{where}: data.paths: is set, but data.source is stdlib; set data.source to text, jsonl, "
                "parquet or hub"
            )
        return FileSource(stdlib_files(where), read_text_leniently, "stdlib", where, "data.source")
    if config.source == "hub":
        if len(config.paths) != 1:
            raise UserError(f"{where}: data.paths: lists {len(config.paths)} names; a hub source takes exactly one")
        return _hub(config, config.hub_split, where, "data.hub_split")
    return _files(config, config.paths, where, "data.paths")


def _validation_source(config: DataConfig, where: str) -> Source:
    key = "data.validation_paths"
    if config.source == "hub":
        if len(config.validation_paths) != 1:
            raise UserError(f"{where}: {key}: lists {len(config.validation_paths)} names; a hub source takes one split")
        split = config.validation_paths[0]
        if split == config.hub_split:
            raise UserError(f"{where}: {key}: {split!r} is the training split too; name another split")
        return _hub(config, split, where, key)
    if config.source == "stdlib":
        raise UserError(f"{where}: {key}: the stdlib source has no files to name; use data.validation_fraction")
    source = _files(config, config.validation_paths, where, key)
    training = {os.path.realpath(file.path) for file in _files(config, config.paths, where, "data.paths").files}
    for file in source.files:
        if os.path.realpath(file.path) in training:
            raise UserError(f"{where}: {key}: '{file.path}' is in data.paths too; take it out of one of them")
    return source


def _files(config: DataConfig, paths: list[str], where: str, key: str) -> FileSource:
    suffix = {"text": "", "jsonl": ".jsonl", "parquet": ".parquet"}.get(config.source)
    if suffix is None:
        raise UserError(f"{where}: data.source: {config.source!r} is unknown; use stdlib, text, jsonl, parquet or hub")
    files = find_files(list(paths), suffix, where, key)
    if config.source == "text":
        return FileSource(files, read_text, "text", where, key)
    reader = read_jsonl if config.source == "jsonl" else read_parquet
    return FileSource(files, reader(config.text_field), f"{config.source} {config.text_field}", where, key)


def _hub(config: DataConfig, split: str, where: str, key: str) -> HubSource:
    name, subset = config.paths[0], config.hub_subset
    return HubSource(name, subset, split, config.text_field, config.streaming, where, key)


def _fraction(config: DataConfig, where: str) -> float:
    if not 0 < config.validation_fraction < 1:
        raise UserError(
            f"{where}: data.validation_fraction: is {config.validation_fraction:g}; set it between 0 and 1, or name "
            "held-out files in data.validation_paths"
        )
    return config.validation_fraction
