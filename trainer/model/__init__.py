"""The shared Mixture-of-Experts definition: single-device code, every published family a config of it."""

from trainer.model.config import ModelConfig
from trainer.model.context import Share
from trainer.model.init import materialize
from trainer.model.model import IGNORED, MoETransformer

__all__ = ["IGNORED", "ModelConfig", "MoETransformer", "Share", "materialize"]
