"""A trained model on one device, ready to be called."""

from pathlib import Path

from backends.base import Backend
from trainer.checkpoint.folder import CONFIG, TOKENIZER, located
from trainer.checkpoint.loading import load_weights
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.tokenizer import Tokenizer, saved_tokenizer
from trainer.model import MoETransformer
from trainer.precision import weights_dtype


def load_for_inference(place: str, backend: Backend) -> tuple[MoETransformer, Tokenizer, Config]:
    """The model of a checkpoint folder, or of the newest checkpoint of a run directory.

    Returns:
        the model in its training precision on the backend's device, its tokenizer and its config.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    checkpoint = located(place)
    config = load_config(str(checkpoint / CONFIG), [])
    return *model_and_tokenizer(checkpoint, config, backend), config


def model_and_tokenizer(checkpoint: Path, config: Config, backend: Backend) -> tuple[MoETransformer, Tokenizer]:
    """What a checkpoint holds of them, under its own config. Raises UserError if it is damaged."""
    tokenizer = saved_tokenizer(checkpoint / TOKENIZER, config.data.tokenizer.end_of_document)
    dtype = weights_dtype(config.train.precision)
    model = MoETransformer(config.model, backend.ops, device=backend.device, dtype=dtype)
    load_weights(checkpoint, model)
    return model.eval(), tokenizer
