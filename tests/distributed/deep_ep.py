"""DeepEP's ``Buffer`` over gloo: what its dispatch and combine are documented to do, and what they refuse.

https://github.com/deepseek-ai/DeepEP, tests/test_intranode.py and the docstrings of ``Buffer``. It stands in for the
package, which needs NVIDIA GPUs.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64
dtypes = [torch.bfloat16]  # of tokens; a test that wants exact sums adds another


class Config:
    """Sizes of the kernels' buffers."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    """Of one group; every call is one of all its ranks."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        assert num_nvl_bytes > 0 and num_rdma_bytes == 0
        self.group, self.ranks, self.rank = group, group.size(), group.rank()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == topk_idx_t and topk_idx.is_contiguous() and num_experts % self.ranks == 0
        rank_TK = torch.where(topk_idx < 0, -1, topk_idx // (num_experts // self.ranks))
        goes_TR = (rank_TK[..., None] == torch.arange(self.ranks)).any(1)
        per_expert = (topk_idx[..., None] == torch.arange(num_experts)).sum((0, 1)).int()
        return goes_TR.sum(0).int(), None, per_expert, goes_TR, None

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Any, ...]:
        self._check(x)
        if handle is not None:
            assert topk_idx is None and topk_weights is None and is_token_in_rank is None
            goes_TR, send, receive = handle
            return self._out(x, goes_TR, send, receive), None, None, None, None, None
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None and num_tokens_per_rdma_rank is None
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        held = num_tokens_per_expert.numel() // self.ranks
        send = num_tokens_per_rank.tolist()
        arriving = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(arriving, num_tokens_per_rank, group=self.group)
        receive = arriving.tolist()
        goes_TR = is_token_in_rank
        indices = self._out(topk_idx, goes_TR, send, receive) - self.rank * held
        indices = torch.where((indices < 0) | (indices >= held), -1, indices)
        weights = self._out(topk_weights, goes_TR, send, receive).masked_fill(indices < 0, 0.0)
        per_expert = (indices[..., None] == torch.arange(held)).sum((0, 1)).tolist()
        return self._out(x, goes_TR, send, receive), indices, weights, per_expert, (goes_TR, send, receive), None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        self._check(x)
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
            topk_weights = self._home(topk_weights, *handle)
        return self._home(x, *handle), topk_weights, None

    def _check(self, x: Tensor) -> None:
        assert x.dtype in dtypes and x.is_contiguous() and x.shape[1] * x.itemsize % 16 == 0

    def _out(self, x: Tensor, goes_TR: Tensor, send: list[int], receive: list[int]) -> Tensor:
        leaving = torch.cat([x[goes_TR[:, rank]] for rank in range(self.ranks)])
        arrived = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(arrived, leaving, receive, send, group=self.group)
        return arrived

    def _home(self, x: Tensor, goes_TR: Tensor, send: list[int], receive: list[int]) -> Tensor:
        back = x.new_empty(sum(send), *x.shape[1:])
        dist.all_to_all_single(back, x, send, receive, group=self.group)
        tokens = torch.cat([goes_TR[:, rank].nonzero()[:, 0] for rank in range(self.ranks)])
        sums = x.new_zeros(len(goes_TR), *x.shape[1:], dtype=torch.float32)
        return sums.index_add_(0, tokens, back.float()).to(x.dtype)
