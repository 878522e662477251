"""What the ranks of one run must have in common before they train together."""

from dataclasses import asdict
from importlib.metadata import version
from operator import attrgetter
from typing import Any

from backends.base import Backend
from trainer.config.catalogue import sections
from trainer.config.schema import Config
from trainer.data import SequenceReader

# Places that each host may have its own of. What is found there has to be the same, and is compared instead.
OWN_PLACES = ("data.paths", "data.validation_paths", "data.tokenizer.path", "data.cache_dir")
PACKAGES = ("moebius-train", "torch", "deepspeed")


def common_facts(
    config: Config, backend: Backend, training: SequenceReader, validation: SequenceReader
) -> dict[str, Any]:
    """Every key of the config but for :data:`OWN_PLACES`, the backend, the data, and versions of the software."""
    keys = [key.path for section in sections(Config) for key in section.keys if key.path not in OWN_PLACES]
    return {
        **{f"version of {package}": version(package) for package in PACKAGES},
        **{key: attrgetter(key)(config) for key in keys},
        "backend": backend.name,  # auto and cpu may come to the same
        **{f"training data: {name}": value for name, value in asdict(training.order).items()},
        **{f"validation data: {name}": value for name, value in asdict(validation.order).items()},
    }
