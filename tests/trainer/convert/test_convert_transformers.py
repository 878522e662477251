"""Weights that transformers has saved compute here what they compute there, and the other way round.

Logits, loss and the gradient of every parameter are compared by the norm of their difference over the norm, in fp32,
with transformers' plain ("eager") attention and experts. The models differ in the order of sums, roundings of 6e-8 that
three layers of norms and softmax enlarge; measured over the examples below: 6.5e-6 at most (a norm of
queries), 1e-6 typically. The bound is the mission's 1e-5.

A tie between two experts that rounding breaks in one of them only would be a difference of another kind. Matrices are
drawn with 1.2 / sqrt(inputs), which spreads router logits over about +-1.2: neighbouring scores of 8 experts are 0.1
apart, the chance of two within 1e-6 is 1e-5 for a token, and the examples are always the same.
"""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

from tests.published import SHAPES, model_of, publish, tensors_of
from trainer.convert import export_weights, import_weights

logging.disable_progress_bar()
BOUND = 1e-5
FILE = 30_000  # bytes: several files
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
MODELS = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
}


def distance(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def fill(model: PreTrainedModel, seed: int) -> None:
    """Norms around 1, biases and expert biases around 0, matrices large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    buffers = [(name, value) for name, value in model.named_buffers() if "rotary" not in name]
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *buffers]:
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("norm.weight"):
                noise = 1 + 0.3 * noise
            elif name.endswith(("bias", "sinks")):
                noise = 0.2 * noise
            elif "embed" not in name:
                noise = noise * 1.2 / value.shape[1] ** 0.5
            value.copy_(noise)


def gradients_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its gradients in the place of its weights: they have the same names and layout."""
    made = copy.deepcopy(model)
    for there, here in zip(made.parameters(), model.parameters(), strict=True):
        there.data = here.grad.clone()
    return made


def compare(family: str, keys: dict, seed: int, folder: Path) -> float:
    """Both ways; the largest distance."""
    shutil.rmtree(folder, ignore_errors=True)
    make_config, make_model = MODELS[family]
    theirs = make_model(make_config(**keys, **EAGER))
    fill(theirs, seed)
    theirs.save_pretrained(folder / "theirs", max_shard_size=FILE)
    done = import_weights(folder / "theirs", folder / "imported")
    assert done.family == family
    assert done.parameters == sum(p.numel() for p in theirs.parameters())

    tokens = torch.randint(keys["vocab_size"], (4, 15), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, 5] = -100
    result = theirs(input_ids=tokens, labels=labels)
    result.loss.backward()
    ours = model_of(folder / "imported")
    shifted = torch.cat([labels[:, 1:], labels.new_full((4, 1), -100)], 1)
    loss = ours(tokens, labels_BS=shifted)
    loss.backward()
    with torch.no_grad():
        logits = ours(tokens)
    apart = {"logits": distance(logits, result.logits), "loss": distance(loss, result.loss)}
    gradients_of(theirs).save_pretrained(folder / "gradients", max_shard_size=FILE)
    import_weights(folder / "gradients", folder / "imported-gradients")
    expected = dict(model_of(folder / "imported-gradients").named_parameters())
    for name, parameter in ours.named_parameters():
        apart[name] = distance(parameter.grad, expected[name])
    worst = max(apart, key=lambda name: apart[name])
    assert apart[worst] < BOUND, f"{worst}: {apart[worst]:.1e}"

    export_weights(str(folder / "imported"), folder / "ours", None, None, FILE)
    again, info = make_model.from_pretrained(folder / "ours", output_loading_info=True, **EAGER)
    assert not any(info.values()), info
    assert torch.equal(again(input_ids=tokens).logits, result.logits)
    return apart[worst]


@st.composite
def drawn(draw: st.DrawFn, family: str) -> dict:
    """Keys of a config.json; the sizes are drawn apart, so that none is the same as another by force."""
    groups = draw(st.integers(1, 2)) if family in ("deepseek_v3", "glm4_moe") else 1
    experts = groups * draw(st.integers(2, 4))
    top_groups = draw(st.integers(1, groups))
    layers, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    keys = {
        "vocab_size": draw(st.integers(20, 40)),
        "hidden_size": draw(st.integers(8, 16)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_experts_per_tok": draw(st.integers(2, max(2, top_groups * experts // groups))),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()),
    }
    routed = {
        "moe_intermediate_size": draw(st.integers(2, 7)),
        "intermediate_size": draw(st.integers(2, 9)),
        "norm_topk_prob": draw(st.booleans()),
    }
    deepseek_router = {
        **routed,
        "n_routed_experts": experts,
        "n_shared_experts": draw(st.integers(1, 2)),
        "n_group": groups,
        "topk_group": top_groups,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "first_k_dense_replace": draw(st.integers(0, layers)),
    }
    grouped_query = {"num_key_value_heads": kv_heads, "head_dim": 4 * draw(st.integers(1, 3))}
    if family == "deepseek_v3":
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
        temperature = draw(st.sampled_from([{}, {"mscale": 1.0, "mscale_all_dim": 0.8}]))
        rope = draw(st.sampled_from([{"rope_type": "default", "rope_theta": 5e4}, {**yarn, **temperature}]))
        return (
            keys
            | deepseek_router
            | {
                "num_key_value_heads": keys["num_attention_heads"],
                "q_lora_rank": draw(st.sampled_from([None, 6])),
                "kv_lora_rank": draw(st.integers(2, 9)),
                "qk_rope_head_dim": 2 * draw(st.integers(1, 3)),
                "qk_nope_head_dim": draw(st.integers(1, 6)),
                "v_head_dim": draw(st.integers(1, 6)),
                "rope_parameters": rope,
                "rope_interleave": draw(st.booleans()),
            }
        )
    if family == "qwen3_moe":
        dense = list(range(draw(st.integers(0, layers))))
        return keys | routed | grouped_query | {"num_experts": experts, "mlp_only_layers": dense, "rope_theta": 1e6}
    if family == "glm4_moe":
        more = {"attention_bias": draw(st.booleans()), "use_qk_norm": draw(st.booleans()), "rms_norm_eps": 1e-5}
        return keys | deepseek_router | grouped_query | more
    return (
        keys
        | grouped_query
        | {
            "num_local_experts": experts,
            "intermediate_size": draw(st.integers(2, 7)),
            "sliding_window": draw(st.integers(1, 12)),
            "swiglu_limit": draw(st.sampled_from([0.5, 7.0])),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.mark.parametrize("family", MODELS)
def test_the_same_model_on_both_sides(family: str, folder: Path) -> None:
    worst = 0.0

    @settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(drawn(family), st.integers(0, 2**20))
    def check(keys: dict, seed: int) -> None:
        nonlocal worst
        worst = max(worst, compare(family, keys, seed, folder / family))

    check()
    print(f"{family}: {worst:.1e}")


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_multi_token_prediction_is_that_of_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers predicts further ahead with these layers for speculative decoding; we train them."""
    config = copy.deepcopy(SHAPES[family])
    config.mtp_layers = 1
    source = publish(tmp_path / "theirs", family, config)
    import_weights(source, tmp_path / "imported")
    ours = model_of(tmp_path / "imported")
    tokens = torch.randint(config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([tokens[:, 1:], tokens.new_full((2, 1), -100)], 1)
    with torch.no_grad():
        ours(tokens, labels_BS=labels)
    losses, _ = ours.meters.take()

    make_model = MODELS[family][1]
    # It knows these layers by the number that they have in the published models.
    monkeypatch.setattr(make_model, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{config.num_layers}\."])
    theirs, info = make_model.from_pretrained(source, output_loading_info=True, **EAGER)
    assert not any(info.values()), info
    further = MtpModel.from_pretrained(theirs)
    with torch.no_grad():
        hidden = theirs.model(input_ids=tokens).last_hidden_state
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        hidden = further.forward_layer(0, hidden, positions, None, input_ids=tokens.roll(-1, 1))
        logits = theirs.lm_head(hidden)
    total = nn.functional.cross_entropy(logits[:, :-2].flatten(0, 1), tokens[:, 2:].flatten(), reduction="sum")
    assert distance(losses["mtp_loss"], total / (labels != -100).sum()) < 1e-6
    # And what we export is loaded there as well.
    export_weights(str(tmp_path / "imported"), tmp_path / "ours", None, None, FILE)
    assert tensors_of(tmp_path / "ours").keys() == tensors_of(source).keys()


def test_bf16_weights_are_read_and_written_as_they_are(tmp_path: Path) -> None:
    config = DeepseekV3Config(**drawn_once())
    theirs = DeepseekV3ForCausalLM(config)
    fill(theirs, 0)
    theirs.bfloat16().save_pretrained(tmp_path / "theirs")
    import_weights(tmp_path / "theirs", tmp_path / "imported")
    export_weights(str(tmp_path / "imported"), tmp_path / "ours", None, None, FILE)
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    for name, value in before.items():
        exact = value.float() if name.endswith("e_score_correction_bias") else value
        assert after[name].dtype == exact.dtype and torch.equal(after[name], exact), name


def drawn_once() -> dict:
    return {
        "vocab_size": 30,
        "hidden_size": 8,
        "intermediate_size": 9,
        "moe_intermediate_size": 5,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 6,
        "kv_lora_rank": 4,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    }
