"""Weights of the Hugging Face format, into our checkpoints and out of them."""

from typing import TYPE_CHECKING

from backends.lazy import exports

if TYPE_CHECKING:
    from trainer.convert.exporting import export_weights
    from trainer.convert.importing import import_weights

__all__ = ["export_weights", "import_weights"]

__getattr__ = exports(
    __name__, {"export_weights": "exporting", "import_weights": "importing"}
)  # families need no torch
