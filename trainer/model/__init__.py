"""The shared Mixture-of-Experts definition: single-device code, every published family a config of it."""

from typing import TYPE_CHECKING

from backends.lazy import exports
from trainer.model.config import ModelConfig

if TYPE_CHECKING:
    from trainer.model.cache import Cache
    from trainer.model.context import MicroBatch, Share
    from trainer.model.init import materialize
    from trainer.model.model import MoETransformer

__all__ = ["Cache", "MicroBatch", "ModelConfig", "MoETransformer", "Share", "materialize"]

__getattr__ = exports(  # a config's shape is known without torch
    __name__,
    {
        "Cache": "cache",
        "MicroBatch": "context",
        "Share": "context",
        "materialize": "init",
        "MoETransformer": "model",
    },
)
