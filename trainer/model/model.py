"""The whole model: embedding, layers, norm, head, multi-token prediction, and the loss.

It knows no process group. Read on one device it is all the mathematics there is; `parallel` shards its experts,
replaces their dispatchers and may leave only some of its layers on a rank.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backends.operations import IGNORED, Operations
from parallel.pipeline.split import Part, whole
from trainer.model.cache import Cache
from trainer.model.config import ModelConfig
from trainer.model.context import Context, Meters, MicroBatch, Share
from trainer.model.layer import MultiTokenPrediction, TransformerLayer
from trainer.model.linear import Linear, RMSNorm, at_least_fp32
from trainer.model.moe import MoE
from trainer.model.rope import rotated_dims, rotations


class MoETransformer(nn.Module):
    """A Mixture-of-Experts language model.

    Args:
        config: its shape.
        ops: the backend's operations.
        device: where parameters are made; "meta" allocates nothing.
        dtype: of the parameters; the expert bias is fp32 always.
        recompute: keep only each layer's input for the backward pass and run the layer again there.
        parts: what to hold of it; None: everything. A pipeline's last part holds a copy of the embedding where it
            is tied to the head or read by multi-token prediction.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Operations,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        parts: Sequence[Part] | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.ops, self.recompute = config, ops, recompute
        self.meters = Meters()
        held = [whole(config.num_layers)] if parts is None else list(parts)
        first, last = any(part.first for part in held), any(part.last for part in held)
        if first or (last and (config.tie_embeddings or config.mtp_layers)):
            self.embed = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self._copied = last and not first
        self.layers = nn.ModuleDict(
            {str(i): TransformerLayer(config, i, ops, **factory) for part in held for i in part.layers}
        )
        if last:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, ops, **factory)
            self.head = Linear(config.hidden_size, config.vocab_size, ops, **factory)
            if config.tie_embeddings:
                self.head.weight = self.embed.weight  # type: ignore[assignment]
        self.mtp = nn.ModuleDict(
            {
                str(k): MultiTokenPrediction(config, config.num_layers + k, ops, **factory)
                for k in range(config.mtp_layers if last else 0)
            }
        )

    @property
    def embedding_copy(self) -> nn.Parameter | None:
        """The embedding's weight where another pipeline stage owns it."""
        return next(self.embed.parameters()) if self._copied and hasattr(self, "embed") else None

    def moe_layers(self) -> Iterator[tuple[str, MoE]]:
        """Layer number, as a string, and MoE module of every MoE layer here, those of MTP included."""
        return ((module.name, module) for module in self.modules() if isinstance(module, MoE))

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        labels_BS: Tensor | None = None,
        share: Share | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The whole model: logits (B, S, V), at least fp32, without labels; this micro-batch's share of the loss with.

        Args:
            tokens_BS: token ids.
            positions_BS: position of each token in its document; default 0 .. S-1, or on from the cache.
            documents_BS: attention stays inside equal values; None: each row is one document.
            labels_BS: the token to predict at each position, -100 where none is.
            share: what the sums are divided by; default: this micro-batch is the whole batch.
            cache: the tokens follow those that it has seen, and it keeps what later ones need of them. The logits are
                those of the whole text, up to rounding and with one exception: no expert drops a token.

        Returns:
            With labels, a scalar: language-model loss plus weighted MTP loss. Balance and z-losses are attached to
            the graph instead (their gradients flow, their values are in ``meters``), because a layer of any
            pipeline stage may add them.
        """
        assert cache is None or documents_BS is labels_BS is None, "a cache is for texts that go on, one a row"
        S, seen = tokens_BS.shape[1], cache.seen if cache is not None else 0
        if positions_BS is None:
            positions_BS = torch.arange(seen, seen + S, device=tokens_BS.device).expand_as(tokens_BS)
        if share is None:
            counted = tokens_BS.numel() if labels_BS is None else int((labels_BS != IGNORED).sum())
            share = Share(tokens=counted, sequences=tokens_BS.shape[0])
        batch = MicroBatch(tokens_BS, positions_BS, documents_BS, labels_BS, share, cache)
        result = self.part(whole(self.config.num_layers), None, batch)
        if cache is not None:
            cache.advance(S)
        return result

    def part(self, part: Part, hidden: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """Some of the layers, as a stage of a pipeline runs them.

        Args:
            part: the layers, all held here.
            hidden: (B, S, H) from the part before; None for the first.
            micro_batch: the same for every part.

        Returns:
            hidden states (B, S, H), in fp32 with ``residual_fp32``; what :meth:`forward` returns for the last part.
        """
        batch = micro_batch
        dims = rotated_dims(self.config.attention, self.config.rope)
        cos, sin = rotations(self.config.rope, dims, batch.positions_BS)
        counted = batch.cache is None  # text that is being written is no batch to report on
        context = Context(cos, sin, batch.documents_BS, batch.share, self.meters, counted, batch.cache)
        if hidden is None:
            hidden = self._embedded(batch.tokens_BS)
        for number in part.layers:
            hidden = self._run(self.layers[str(number)], hidden, context)
        return self._finish(hidden, batch, context) if part.last else hidden

    def _finish(self, hidden: Tensor, batch: MicroBatch, context: Context) -> Tensor:
        """Behind the last layer: logits without labels, the loss with."""
        hidden = self.norm(hidden)
        if batch.labels_BS is None:
            return at_least_fp32(self.head(self._before_head(hidden)))
        loss = self._cross_entropy(hidden, batch.labels_BS, batch.share)
        self.meters.add("lm_loss", loss)
        if self.mtp:
            further = self._further_ahead(hidden, batch.tokens_BS, batch.labels_BS, context)
            self.meters.add("mtp_loss", further)
            loss = loss + self.config.mtp_loss * further
        return loss

    def _embedded(self, tokens_BS: Tensor) -> Tensor:
        hidden = F.embedding(tokens_BS, self.embed.weight)
        return at_least_fp32(hidden) if self.config.residual_fp32 else hidden

    def _run(self, layer: nn.Module, hidden: Tensor, context: Context, *more: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return layer(hidden, *more, context)
        return checkpoint(
            layer,
            hidden,
            *more,
            context,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a layer is random
            context_fn=lambda: (nullcontext(), context.silent()),
        )

    def _cross_entropy(self, hidden_BSH: Tensor, labels_BS: Tensor, share: Share) -> Tensor:
        hidden_TH = self._before_head(hidden_BSH).flatten(0, 1)
        total, _ = self.ops.linear_cross_entropy(hidden_TH, self.head.weight, labels_BS.flatten())
        return total / share.tokens

    def _before_head(self, hidden_BSH: Tensor) -> Tensor:
        """What the head multiplies with.

        NormHead (inclusionAI's Ling) divides each column of the head's weight by its norm, which is no part of the
        graph. Dividing the hidden states instead is the same product.
        """
        if not self.config.normalize_head:
            return hidden_BSH
        norms_H = torch.linalg.vector_norm(at_least_fp32(self.head.weight.detach()), dim=0)
        return (hidden_BSH / (norms_H + 1e-7)).to(hidden_BSH.dtype)

    def _further_ahead(self, hidden: Tensor, tokens_BS: Tensor, labels_BS: Tensor, context: Context) -> Tensor:
        """Mean over MTP layers of their cross entropies, each divided by the same token count (equation 24)."""
        total = hidden.new_zeros((), dtype=torch.float32)
        ignored = labels_BS.new_full((labels_BS.shape[0], 1), IGNORED)
        for layer in self.mtp.values():
            # One token further: position i sees token i+k and predicts token i+k+1, within its document.
            tokens_BS = tokens_BS.roll(-1, 1)
            further = torch.cat([labels_BS[:, 1:], ignored], 1)
            labels_BS = further.masked_fill(labels_BS == IGNORED, IGNORED)
            hidden = self._run(layer, hidden, context, self._embedded(tokens_BS))
            total = total + self._cross_entropy(hidden, labels_BS, context.share)
        return total / len(self.mtp)
