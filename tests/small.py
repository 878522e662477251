"""Small configs, data and models that many tests share."""

import random
from pathlib import Path

import torch

from trainer.config.load import load_config
from trainer.config.schema import Config

YAML = """
name: small
model:
  vocab_size: 320
  hidden_size: 32
  num_layers: 3
  dense_layers: 1
  dense_hidden_size: 64
  attention: {kind: mla, num_heads: 2, q_lora_rank: 16, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8,
              v_head_dim: 8}
  rope: {interleaved: true}
  moe: {num_experts: 8, top_k: 2, expert_hidden_size: 16, num_shared_experts: 1, score: sigmoid, scale: 2.0,
        expert_bias: true, aux_loss: 0.01, z_loss: 0.001}
  mtp_layers: 1
  init_std: 0.1  # scores far apart: a near-tie that rounding could flip is then very unlikely
data:
  source: text
  sequence_length: 32
  validation_fraction: 0.2
  tokenizer: {vocab_size: 300}
optimizer: {lr: 0.003, clip_norm: 0.5}
schedule: {warmup_steps: 3}
train: {steps: 20, global_batch_tokens: 256, micro_batch_size: 2, eval_every: 10, eval_sequences: 6}
checkpoint: {every: 7}
metrics: {tensorboard: false, peak_tflops: 0.1}
"""


def write_inputs(folder: Path) -> Path:
    """A config and the text it trains on; the config's path."""
    words = "the a of model expert token layer router loss rank step gather scatter bias sum mean".split()
    draw = random.Random(0)
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(60):
        lines = (" ".join(draw.choices(words, k=9)) for _ in range(draw.randint(1, 12)))
        (texts / f"{number:02}.txt").write_text("\n".join(lines))
    path = folder / "small.yaml"
    path.write_text(YAML)
    return path


def small_config(path: Path, *overrides: str) -> Config:
    """The config that :func:`write_inputs` wrote; everything lies beside it."""
    folder = path.parent
    places = [f"data.paths=[{folder}/texts]", f"data.cache_dir={folder}/cache"]
    return load_config(str(path), [*places, *overrides])


def total_norm(parameters: list[torch.nn.Parameter]) -> float:
    """Gradient norm in fp64: torch's own fp32 norm of a long vector is off by more than our tolerances."""
    return float(torch.stack([p.grad.double().square().sum() for p in parameters if p.grad is not None]).sum().sqrt())
