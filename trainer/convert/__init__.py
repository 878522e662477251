"""Weights of the Hugging Face format, into our checkpoints and out of them."""

from trainer.convert.exporting import export_weights
from trainer.convert.importing import import_weights

__all__ = ["export_weights", "import_weights"]
