"""The same architecture in transformers, alone or inside DeepSpeed. Imports nothing of ours that sets an allocator."""

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contender import Contender, Unavailable, fused_adamw, plain_contender

FAMILIES = {"gqa": "qwen3_moe", "mla": "deepseek_v3"}


def _common(model: dict[str, Any]) -> dict[str, Any]:
    moe = model["moe"]
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["dense_hidden_size"],
        "moe_intermediate_size": moe["expert_hidden_size"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["attention"]["num_heads"],
        "num_experts_per_tok": moe["top_k"],
        "norm_topk_prob": moe["normalize"],
        "rms_norm_eps": model["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": model["rope"]["theta"]},
        "tie_word_embeddings": model["tie_embeddings"],
        "attn_implementation": "sdpa",
        "experts_implementation": "grouped_mm",
        "use_cache": False,
    }


def _qwen3(model: dict[str, Any]) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = model["attention"]
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_common(model),
            num_key_value_heads=shape["num_kv_heads"],
            head_dim=shape["head_dim"],
            attention_bias=shape["bias"],
            num_experts=model["moe"]["num_experts"],
            mlp_only_layers=list(range(model["dense_layers"])),
        )
    )


def _deepseek_v3(model: dict[str, Any]) -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    shape, moe = model["attention"], model["moe"]
    ranks = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_common(model),
            **{name: shape[name] for name in ranks},
            q_lora_rank=shape["q_lora_rank"] or None,
            num_key_value_heads=shape["num_heads"],
            rope_interleave=model["rope"]["interleaved"],
            n_routed_experts=moe["num_experts"],
            n_shared_experts=moe["num_shared_experts"],
            n_group=moe["num_groups"],
            topk_group=moe["top_groups"],
            routed_scaling_factor=moe["scale"],
            first_k_dense_replace=model["dense_layers"],
            num_mtp_layers=0,
        )
    )


def _same_architecture(job: dict[str, Any]) -> nn.Module:
    """The transformers model of the job's shape, experts through torch's grouped multiply: their fastest on CPU."""
    try:
        import transformers
    except ImportError:
        raise Unavailable("transformers is not installed; pip install 'moebius-train[hf]'") from None
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = job["model"]
    made = _qwen3(model) if model["attention"]["kind"] == "gqa" else _deepseek_v3(model)
    parameters = sum(p.numel() for p in made.parameters())
    if parameters != job["parameters"]:
        raise Unavailable(
            f"{type(made).__name__} of this shape has {parameters:,} parameters, ours {job['parameters']:,}: "
            "not the same architecture"
        )
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    return made.to(job["device"], dtype)


def transformers(job: dict[str, Any]) -> Contender:
    """transformers in the plain loop."""
    model = _same_architecture(job)
    return plain_contender(model, lambda tokens: model(input_ids=tokens, labels=tokens).loss, job)


def deepspeed(job: dict[str, Any]) -> Contender:
    """transformers in DeepSpeed ZeRO-1, which is given torch's fused AdamW: its own is slower."""
    return _in_deepspeed(job, {})


def autoep(job: dict[str, Any]) -> Contender:
    """transformers in DeepSpeed ZeRO-1 with its MoE layers replaced by those of AutoEP, all experts on one rank."""
    family = FAMILIES[job["model"]["attention"]["kind"]]
    _let_autoep_read_the_registry()
    return _in_deepspeed(job, {"expert_parallel": {"enabled": True, "autoep_size": 1, "preset_model": family}})


def _let_autoep_read_the_registry() -> None:
    """AutoEP (DeepSpeed 0.19.8) looks names up with a default, which transformers' registry no longer takes."""
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY as registry
    except ImportError:
        return
    kind = type(registry)
    by_model = kind.get
    if kind is not dict:
        kind.get = lambda self, key, *more: dict.get(self, key, *more) if isinstance(key, str) else by_model(self, key)


def _groups(parameters: Any) -> list[Any]:
    """Experts that AutoEP made are a group of their own."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    listed = list(parameters)
    if not any(hasattr(parameter, "allreduce") and not parameter.allreduce for parameter in listed):
        return listed
    return split_params_into_different_moe_groups_for_optimizer({"params": listed, "name": "all"})


def _in_deepspeed(job: dict[str, Any], more: dict[str, Any]) -> Contender:
    os.environ.setdefault("DS_ACCELERATOR", torch.device(job["device"]).type)
    os.environ.setdefault("LOCAL_RANK", "0")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed as ds

    ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at start, used between processes only
    name = "gloo" if job["device"] == "cpu" else None
    torch.distributed.init_process_group(name, store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = _same_architecture(job)
    config = {
        "train_micro_batch_size_per_gpu": job["batch"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": job["optimizer"]["clip_norm"],
        "bf16": {"enabled": job["precision"] == "bf16"},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **more,
    }
    engine, *_ = ds.initialize(
        model=model,
        optimizer=lambda parameters: fused_adamw(_groups(parameters), job),
        model_parameters=list(model.parameters()),
        config=config,
    )
    engine.train()

    def step(tokens_BS: Tensor) -> Tensor:
        loss = engine(input_ids=tokens_BS, labels=tokens_BS).loss
        engine.backward(loss)
        with torch.profiler.record_function("bench::optimizer"):
            engine.step()
        return loss.detach()

    return Contender(step, sum(p.numel() for p in engine.module.parameters()))
