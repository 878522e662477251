"""The loss on sequences that a model does not learn from: in training, and of a checkpoint by itself."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backends.base import Backend
from backends.operations import IGNORED
from parallel.pipeline.pipeline import Pipeline
from parallel.topology import Topology, sum_over
from trainer.config.schema import Config
from trainer.data import Batch, SequenceReader
from trainer.model import MicroBatch, MoETransformer, Share


@dataclass(frozen=True)
class Evaluation:
    """What was found, over all ranks."""

    loss: float  # mean cross entropy of the next token, in nats
    sequences: int
    tokens: int  # predicted
    bytes: int  # of the text of these tokens; 0 if nobody asked

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The whole loss in bits over the bytes of the predicted text: it can be compared between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes


def evaluate(
    model: MoETransformer,
    pipeline: Pipeline,
    topology: Topology,
    backend: Backend,
    reader: SequenceReader,
    config: Config,
    bytes_V: Tensor | None = None,
) -> Evaluation:
    """Run the first ``train.eval_sequences`` sequences of a reader through the model, in ``train.micro_batch_size``.

    Every rank calls this. The model is in training mode afterwards.

    Args:
        reader: does not wrap; it is read from its start.
        bytes_V: the bytes that each token stands for, to count those of the predicted ones.
    """
    dp, length = topology.dp, config.data.sequence_length
    mine = pipeline.round * config.train.micro_batch_size  # sequences of this rank in one round
    model.eval()
    reader.restart()
    total = torch.zeros(3, dtype=torch.float64)
    left = config.train.eval_sequences or math.inf
    while left > 0:
        count = int(min(dp.size * mine, left))
        first = min(dp.rank * mine, count)
        batch = reader.read(count, range(first, min(first + mine, count)))
        # Every rank must run as often as the others, whose experts it holds: pad with sequences that count nothing.
        here = _padded(batch, mine, length)
        pipeline.evaluate(micro_batches(here, Share(1.0, 1.0), config, backend.device))
        sums, _ = model.meters.take()
        loss = sums["lm_loss"].double().cpu() if "lm_loss" in sums else torch.zeros((), dtype=torch.float64)
        predicted = here.labels_BS[here.labels_BS != IGNORED]
        size = predicted.new_zeros(()) if bytes_V is None else bytes_V[predicted].sum()
        counts = torch.stack([torch.tensor(predicted.numel()), size]) * (topology.pp.rank == 0)  # all stages see them
        row = torch.cat([loss[None], counts.double()])
        row = sum_over(topology.world, row.to(backend.device)).cpu()
        if row[1] == 0:
            break  # the sequences are exhausted
        total += row
        left -= count
    model.train()
    return Evaluation(float(total[0] / total[1]), reader.position, int(total[1]), int(total[2]))


def micro_batches(batch: Batch, share: Share, config: Config, device: torch.device) -> list[MicroBatch]:
    """A rank's batch in parts of ``train.micro_batch_size`` sequences, on the device."""
    parts = batch.to(device).split(config.train.micro_batch_size)
    reset = config.data.reset_at_documents
    return [
        MicroBatch(part.tokens_BS, part.positions_BS, part.documents_BS if reset else None, part.labels_BS, share)
        for part in parts
    ]


def _padded(batch: Batch, sequences: int, length: int) -> Batch:
    """The batch with rows that predict nothing added up to ``sequences``."""
    missing = sequences - len(batch)
    if not missing:
        return batch
    zeros = torch.zeros(missing, length, dtype=torch.int64)
    return Batch(
        torch.cat([batch.tokens_BS, zeros]),
        torch.cat([batch.labels_BS, zeros + IGNORED]),
        torch.cat([batch.positions_BS, torch.arange(length).expand(missing, length)]),
        torch.cat([batch.documents_BS, zeros]),
    )
