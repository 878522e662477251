"""Checkpoints that move between layouts, on `torch.distributed.checkpoint`."""

from trainer.checkpoint.inference import load_for_inference
from trainer.checkpoint.store import load, newest, save, step_of

__all__ = ["load", "load_for_inference", "newest", "save", "step_of"]
