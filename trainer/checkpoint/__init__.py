"""Checkpoints that move between layouts, on `torch.distributed.checkpoint`."""

from trainer.checkpoint.folder import located, newest, starting_point, step_of
from trainer.checkpoint.inference import load_for_inference
from trainer.checkpoint.load import load, load_initial
from trainer.checkpoint.saver import Saver

__all__ = ["Saver", "load", "load_for_inference", "load_initial", "located", "newest", "starting_point", "step_of"]
