"""How fast a training step is here, beside the same architecture in other trainers."""
