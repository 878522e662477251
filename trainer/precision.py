"""What the words of ``train.precision`` mean."""

import torch


def weights_dtype(precision: str) -> torch.dtype:
    """The dtype of the model's weights; master weights and gradients are fp32 in either case."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
