"""Every key of a run, with its meaning and default: the source of `--help`, of validation and of the YAML files."""

from dataclasses import dataclass
from typing import Optional

from backends.key import key
from parallel.config import ParallelConfig
from trainer.model.config import ModelConfig


@dataclass
class TokenizerConfig:
    """A `tokenizer.json`, or a byte-level BPE trained on the corpus and cached."""

    path: Optional[str] = key(None, "a tokenizer.json; null trains a byte-level BPE on the training documents")
    vocab_size: int = key(4096, "entries of the BPE to train when path is null")
    end_of_document: str = key("<|endoftext|>", "token that closes a document")


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes sequences."""

    source: str = key(
        "stdlib",
        "stdlib (this Python's own standard library), text, jsonl, parquet or hub",
        choices=("stdlib", "text", "jsonl", "parquet", "hub"),
    )
    paths: list[str] = key(list, "files, folders or globs (text, jsonl, parquet); for hub: the dataset's name")
    validation_paths: list[str] = key(list, "held-out files or hub split; empty: see validation_fraction")
    validation_fraction: float = key(0.02, "share of the documents held out for evaluation")
    text_field: str = key("text", "field that holds the text (jsonl, parquet, hub)")
    hub_subset: Optional[str] = key(None, "configuration of a hub dataset")
    hub_split: str = key("train", "split of a hub dataset")
    streaming: bool = key(False, "read documents as they come instead of tokenizing everything first")
    sequence_length: int = key(512, "tokens of one packed sequence")
    reset_at_documents: bool = key(True, "restart positions and stop attention at document boundaries")
    shuffle: bool = key(True, "permute the sequences of each epoch by the seed")
    cache_dir: str = key("~/.cache/moebius", "where trained tokenizers and tokenized documents are kept")
    tokenizer: TokenizerConfig = key(TokenizerConfig, "tokenizer")


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101). Weight decay applies to matrices and experts, not to norms and biases."""

    lr: float = key(3e-4, "peak learning rate")
    beta1: float = key(0.9, "decay of the first moment")
    beta2: float = key(0.95, "decay of the second moment")
    eps: float = key(1e-8, "added to the root of the second moment")
    weight_decay: float = key(0.1, "decoupled weight decay")
    clip_norm: float = key(1.0, "largest global gradient norm; 0 never clips")


@dataclass
class ScheduleConfig:
    """Learning rate over steps: a linear warm-up, then the chosen shape."""

    kind: str = key("cosine", "cosine, constant or wsd (warm-up, stable, decay)", choices=("cosine", "constant", "wsd"))
    warmup_steps: int = key(100, "steps of linear warm-up from 0")
    decay_steps: int = key(0, "steps of the final linear decay (wsd)")
    min_ratio: float = key(0.1, "last learning rate as a share of the peak (cosine, wsd)")


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = key(1000, "optimizer steps")
    global_batch_tokens: int = key(16384, "tokens of one optimizer step over all ranks and micro-batches")
    micro_batch_size: int = key(4, "sequences that one rank runs at a time")
    precision: str = key("fp32", "fp32, or bf16 with fp32 master weights and gradients", choices=("fp32", "bf16"))
    activation_checkpointing: str = key(
        "none", "none, or layer: keep only each layer's input and recompute the rest", choices=("none", "layer")
    )
    deterministic: bool = key(True, "refuse operations whose result varies from run to run")
    eval_every: int = key(200, "steps between evaluations; 0 evaluates only at the end")
    eval_sequences: int = key(64, "held-out sequences of an evaluation; 0 takes all")
    bigram_baseline: bool = key(False, "at the end, fit a bigram model on the same tokens and print its loss beside")
    log_every: int = key(1, "steps between metric records")


@dataclass
class CheckpointConfig:
    """When the run is saved."""

    every: int = key(200, "steps between checkpoints; 0 saves only at the end")
    keep: int = key(2, "newest checkpoints to keep; 0 keeps all")
    keep_every: int = key(0, "keep the checkpoints of every so many steps for ever; 0 keeps none")
    asynchronous: bool = key(True, "write while training goes on, from a copy of the state in the host's memory")
    initial: Optional[str] = key(
        None, "a checkpoint, or run directory, whose weights a new run starts from; optimizer and data start anew"
    )


@dataclass
class MetricsConfig:
    """Where metrics go besides the screen and metrics.jsonl."""

    tensorboard: bool = key(True, "write TensorBoard events into the run directory")
    csv: bool = key(False, "write CSV files through DeepSpeed's monitor")
    wandb: bool = key(False, "send metrics to Weights & Biases through DeepSpeed's monitor")
    wandb_project: str = key("moebius", "Weights & Biases project")
    trace_step: int = key(0, "step whose pipeline `moebius pipeline --trace` is to draw; 0: none")
    peak_tflops: float = key(0.0, "peak TFLOP/s of one device for MFU; 0 takes the published or measured figure")


@dataclass
class Config:
    """One training run."""

    name: str = key("run", "name of the run")
    run_dir: Optional[str] = key(None, "checkpoints, metrics and logs go here; null means runs/<name>")
    backend: str = key("auto", "auto, cpu, cuda or ascend", choices=("auto", "cpu", "cuda", "ascend"))
    seed: int = key(0, "seed of initial weights, data order and sampling; independent of the layout")
    model: ModelConfig = key(ModelConfig, "the model")
    data: DataConfig = key(DataConfig, "data and tokenizer")
    optimizer: OptimizerConfig = key(OptimizerConfig, "optimizer")
    schedule: ScheduleConfig = key(ScheduleConfig, "learning-rate schedule")
    train: TrainConfig = key(TrainConfig, "training loop")
    parallel: ParallelConfig = key(ParallelConfig, "layout of the ranks")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "checkpoints")
    metrics: MetricsConfig = key(MetricsConfig, "metrics")
