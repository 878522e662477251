"""Checkpoints that move between layouts, on `torch.distributed.checkpoint`."""

from typing import TYPE_CHECKING

from backends.lazy import exports
from trainer.checkpoint.folder import located, newest, starting_point, step_of

if TYPE_CHECKING:
    from trainer.checkpoint.inference import load_for_inference
    from trainer.checkpoint.loading import load, load_initial
    from trainer.checkpoint.saver import Saver

__all__ = ["Saver", "load", "load_for_inference", "load_initial", "located", "newest", "starting_point", "step_of"]

_HOMES = {"Saver": "saver", "load": "loading", "load_initial": "loading", "load_for_inference": "inference"}
__getattr__ = exports(__name__, _HOMES)
