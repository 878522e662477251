"""The shared Mixture-of-Experts definition: single-device code, every published family a config of it."""

from trainer.model.config import ModelConfig
from trainer.model.context import MicroBatch, Share
from trainer.model.init import materialize
from trainer.model.model import MoETransformer

__all__ = ["MicroBatch", "ModelConfig", "MoETransformer", "Share", "materialize"]
