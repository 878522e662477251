"""The same architecture in torchtitan's modules, in the plain loop.

torchtitan needs packages that a CPU installation of torch does not bring (triton among them), so it may live in an
environment of its own: see ``--torchtitan-python``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contender import Contender, Unavailable, plain_contender


def torchtitan(job: dict[str, Any]) -> Contender:
    """torchtitan's Qwen3 or DeepSeek-V3 with scaled-dot-product attention: its own choices need a GPU."""
    try:
        from torchtitan.models.common import moe
    except ImportError as error:
        raise Unavailable(
            f"{error}; pip install torchtitan triton into an environment with this torch and name its interpreter "
            "with --torchtitan-python"
        ) from None
    moe.GroupedExperts.forward = _experts  # type: ignore[method-assign]
    torch.manual_seed(0)
    model = (_qwen3 if job["model"]["attention"]["kind"] == "gqa" else _deepseek_v3)(job)
    model.init_states()
    model.to(job["device"], torch.bfloat16 if job["precision"] == "bf16" else torch.float32)

    def loss(tokens_BS: Tensor) -> Tensor:
        logits_BSV = model(tokens_BS)[:, :-1]
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), tokens_BS[:, 1:].flatten())

    return plain_contender(model, loss, job)


def _experts(self: nn.Module, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """Theirs casts to bf16 whatever the model's precision; without that fp32 is compared with fp32."""
    ends_E = counts_E.cumsum(0, dtype=torch.int32)

    def multiply(rows: Tensor, weight: Any) -> Tensor:
        return self._grouped_mm(A=rows, B_t=weight.transpose(-2, -1), offs=ends_E)

    hidden_RF = F.silu(multiply(x_RD, self.w1_EFD)) * multiply(x_RD, self.w3_EFD)
    return multiply(hidden_RF, self.w2_EDF)


def _ends(job: dict[str, Any], norm: Any) -> dict[str, Any]:
    """What comes before and after the layers."""
    from torchtitan.models.common import Embedding, Linear

    model = job["model"]
    size, vocabulary = model["hidden_size"], model["vocab_size"]
    init = {"weight": lambda weight: nn.init.normal_(weight, std=model["init_std"])}
    return {
        "vocab_size": vocabulary,
        "dim": size,
        "norm": norm,
        "tok_embeddings": Embedding.Config(num_embeddings=vocabulary, embedding_dim=size, param_init=init),
        "lm_head": Linear.Config(in_features=size, out_features=vocabulary, param_init=init),
    }


def _with_sdpa(layers: list[Any]) -> list[Any]:
    from torchtitan.models.common.attention import ScaledDotProductAttention

    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return layers


def _qwen3(job: dict[str, Any]) -> nn.Module:
    from torchtitan.models import qwen3
    from torchtitan.models.common import CosSinRoPE

    model = job["model"]
    shape, moe = model["attention"], model["moe"]
    layers = qwen3._build_qwen3_moe_layers(
        n_layers=model["num_layers"],
        dim=model["hidden_size"],
        n_heads=shape["num_heads"],
        n_kv_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        moe_hidden_dim=moe["expert_hidden_size"],
        num_experts=moe["num_experts"],
        top_k=moe["top_k"],
        attn_backend="flex",
        moe_comm_backend="standard",
        rope=CosSinRoPE.Config(dim=shape["head_dim"], max_seq_len=job["sequence"], theta=model["rope"]["theta"]),
    )
    ends = _ends(job, qwen3._qwen3_norm(model["hidden_size"]))
    return qwen3.Qwen3Model.Config(layers=_with_sdpa(layers), **ends).build()


def _deepseek_v3(job: dict[str, Any]) -> nn.Module:
    from torchtitan.models import deepseek_v3
    from torchtitan.models.common import ComplexRoPE, RMSNorm

    model = job["model"]
    shape, moe = model["attention"], model["moe"]
    ranks = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    rotated = shape["qk_rope_head_dim"]
    layers = deepseek_v3._build_dsv3_layers(
        n_layers=model["num_layers"],
        n_dense_layers=model["dense_layers"],
        dim=model["hidden_size"],
        n_heads=shape["num_heads"],
        **{name: shape[name] for name in ranks},
        mscale=1.0,
        dense_hidden_dim=model["dense_hidden_size"],
        moe_hidden_dim=moe["expert_hidden_size"],
        num_experts=moe["num_experts"],
        num_shared_experts=moe["num_shared_experts"],
        router_top_k=moe["top_k"],
        router_score_func=moe["score"],
        router_route_norm=moe["normalize"],
        router_route_scale=moe["scale"],
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=rotated, max_seq_len=job["sequence"], theta=model["rope"]["theta"]),
    )
    norm = RMSNorm.Config(normalized_shape=model["hidden_size"], param_init={"weight": nn.init.ones_})
    config = deepseek_v3.DeepSeekV3Model.Config(layers=_with_sdpa(layers), mtp_layers=[], **_ends(job, norm))
    return config.build()
