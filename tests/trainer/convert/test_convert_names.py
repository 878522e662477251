"""The tables of names and keys: every family there and back, what the published models are, and Ling's written out."""

import copy
import json
import math
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from backends import UserError, select
from tests.published import SHAPES, model_of, publish, tensors_of
from trainer.convert import export_weights, import_weights
from trainer.convert.families import FAMILIES
from trainer.convert.names import copies, slots
from trainer.convert.settings import config_from, config_to, family_of
from trainer.model import ModelConfig, MoETransformer
from trainer.model.count import count_parameters

_YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**_YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
_KIMI = {
    **_DEEPSEEK,
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**_YARN, "beta_fast": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
_TELECHAT = {
    **_DEEPSEEK,
    "first_k_dense_replace": 1,
    "hidden_size": 2560,
    "intermediate_size": 7680,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 45,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "routed_scaling_factor": 2.8,
    "topk_group": 1,
    "vocab_size": 131072,
}
_QWEN = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_GLM_AIR = {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "partial_rotary_factor": 0.5,
    "intermediate_size": 10944,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "num_hidden_layers": 46,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 151552,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "use_qk_norm": False,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**_YARN, "rope_type": "yarn", "factor": 32.0, "truncate": False},
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
_LING_PLUS = {
    "model_type": "bailing_moe",
    "first_k_dense_replace": 0,
    "hidden_act": "silu",
    "hidden_size": 5376,
    "intermediate_size": 12288,
    "moe_intermediate_size": 3072,
    "num_experts": 64,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 42,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 88,
    "num_key_value_heads": 6,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "vocab_size": 126464,
    "norm_head": True,
    "norm_softmax": False,
}
_LING_MINI = {
    "model_type": "bailing_moe_v2",
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "n_group": 8,
    "topk_group": 4,
    "num_experts": 256,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "vocab_size": 157184,
}

# The shape of published models, in the keys of their config.json, and the parameters that their makers count: in
# billions, all and active per token, as precisely as they say it, without multi-token prediction.
PUBLISHED = {
    "DeepSeek-V3": (_DEEPSEEK, 671, 0),
    "Kimi-K2": (_KIMI, 1026, 0),
    "TeleChat3-105B-A4.7B": (_TELECHAT, 102.3, 1),
    "Qwen3-30B-A3B": (_QWEN, 30.5, 1),
    "GLM-4.5-Air": (_GLM_AIR, 106, 0),
    "gpt-oss-120b": (_GPT_OSS, 116.83, 2),
    "Ling-plus": (_LING_PLUS, 290, 0),
    "Ling-mini-2.0": (_LING_MINI, 16, 0),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_config_is_a_model_of_the_published_size(model: str) -> None:
    keys, billions, digits = PUBLISHED[model]
    family = next(family for family in FAMILIES.values() if keys["model_type"] in family.model_types)
    config = config_from(keys, family, model)
    counts = count_parameters(MoETransformer(config, select("cpu").ops, device="meta"))
    total = sum(count.total for part, count in counts.items() if part != "multi-token prediction")
    assert abs(total / 1e9 - billions) < 10**-digits  # some round, some cut
    # Back again: the same, in the family's own key order and with what it always has.
    written = config_to(config, family, model) | {"model_type": keys["model_type"]}
    assert config_from(written, family, model) == config
    for key, value in keys.items():
        if key not in ("rope_scaling", "head_dim"):
            assert written[key] == value, key
    assert (written["rope_scaling"] is None) == (keys["rope_scaling"] is None)


def test_every_tensor_of_deepseek_v3_has_a_place() -> None:
    """What its published weight map lists."""
    family = FAMILIES["deepseek_v3"]
    config = config_from(_DEEPSEEK, family, "test")
    named = slots(config, family)
    experts = 256 * 3
    attention, norms, shared, router = 7, 2, 3, 2
    assert len(named) == 3 + 3 * (attention + norms + 3) + 59 * (attention + norms + shared + router + experts) + 4
    layer = "model.layers.61."
    assert named[f"{layer}eh_proj.weight"].shape == (7168, 14336)
    assert named[f"{layer}mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert named["model.layers.3.mlp.gate.e_score_correction_bias"].always_fp32
    assert named["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 7168)
    assert copies(config, family) == {
        f"{layer}embed_tokens.weight": "model.embed_tokens.weight",
        f"{layer}shared_head.head.weight": "lm_head.weight",
    }


@pytest.mark.parametrize("name", SHAPES)
def test_each_element_of_ours_is_one_of_theirs(name: str) -> None:
    config = SHAPES[name]
    model = MoETransformer(config, select("cpu").ops, device="meta")
    ours = {f"weight.{key}": value.numel() for key, value in model.named_parameters()}
    ours |= {f"buffer.{key}": value.numel() for key, value in model.named_buffers()}
    seen = {key: torch.zeros(size, dtype=torch.int) for key, size in ours.items()}
    for slot in slots(config, FAMILIES[name]).values():
        assert sum(place.count for place in slot.places) == math.prod(slot.shape)
        for place in slot.places:
            assert place.whole == ours[place.key]
            seen[place.key][place.offset : place.offset + place.count] += 1
    assert all((times == 1).all() for times in seen.values())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_export_of_an_import_is_the_same_files(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, multi-token prediction and its copies of embedding and head included."""
    source = publish(tmp_path / "theirs", name, SHAPES[name], dtype)
    import_weights(source, tmp_path / "imported")
    assert export_weights(str(tmp_path / "imported"), tmp_path / "ours", None, None, 20_000).files > 1
    before, after = tensors_of(source), tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value), key
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "ours"))
    assert {key: new[key] for key in old} == old
    for kept in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "ours" / kept).read_bytes() == (source / kept).read_bytes()


LING = """
lm_head.weight 300 12
model.layers.0.attention.dense.bias 12
model.layers.0.attention.dense.weight 12 32
model.layers.0.attention.query_key_value.bias 64
model.layers.0.attention.query_key_value.weight 64 12
model.layers.0.input_layernorm.weight 12
model.layers.0.mlp.experts.0.down_proj.weight 12 7
model.layers.0.mlp.experts.0.gate_proj.weight 7 12
model.layers.0.mlp.experts.0.up_proj.weight 7 12
model.layers.0.mlp.experts.1.down_proj.weight 12 7
model.layers.0.mlp.experts.1.gate_proj.weight 7 12
model.layers.0.mlp.experts.1.up_proj.weight 7 12
model.layers.0.mlp.gate.weight 2 12
model.layers.0.mlp.shared_experts.down_proj.weight 12 14
model.layers.0.mlp.shared_experts.gate_proj.weight 14 12
model.layers.0.mlp.shared_experts.up_proj.weight 14 12
model.layers.0.post_attention_layernorm.weight 12
model.norm.weight 12
model.word_embeddings.weight 300 12
"""
LING_2 = """
lm_head.weight 300 12
model.layers.0.attention.dense.weight 12 32
model.layers.0.attention.key_layernorm.weight 8
model.layers.0.attention.query_key_value.weight 64 12
model.layers.0.attention.query_layernorm.weight 8
model.layers.0.input_layernorm.weight 12
model.layers.0.mlp.down_proj.weight 12 10
model.layers.0.mlp.gate_proj.weight 10 12
model.layers.0.mlp.up_proj.weight 10 12
model.layers.0.post_attention_layernorm.weight 12
model.layers.1.attention.dense.weight 12 32
model.layers.1.attention.key_layernorm.weight 8
model.layers.1.attention.query_key_value.weight 64 12
model.layers.1.attention.query_layernorm.weight 8
model.layers.1.eh_proj.weight 12 24
model.layers.1.enorm.weight 12
model.layers.1.final_layernorm.weight 12
model.layers.1.hnorm.weight 12
model.layers.1.input_layernorm.weight 12
model.layers.1.mlp.experts.0.down_proj.weight 12 7
model.layers.1.mlp.experts.0.gate_proj.weight 7 12
model.layers.1.mlp.experts.0.up_proj.weight 7 12
model.layers.1.mlp.experts.1.down_proj.weight 12 7
model.layers.1.mlp.experts.1.gate_proj.weight 7 12
model.layers.1.mlp.experts.1.up_proj.weight 7 12
model.layers.1.mlp.gate.expert_bias 2
model.layers.1.mlp.gate.weight 2 12
model.layers.1.mlp.shared_experts.down_proj.weight 12 7
model.layers.1.mlp.shared_experts.gate_proj.weight 7 12
model.layers.1.mlp.shared_experts.up_proj.weight 7 12
model.layers.1.post_attention_layernorm.weight 12
model.norm.weight 12
model.word_embeddings.weight 300 12
"""


@pytest.mark.parametrize(("name", "expected"), [("bailing_moe", LING), ("bailing_moe_v2", LING_2)])
def test_the_names_of_ling_as_its_own_code_has_them(name: str, expected: str, tmp_path: Path) -> None:
    """Written out by hand from the modules of inclusionAI's modeling files, of one layer with two experts."""
    config = copy.deepcopy(SHAPES[name])
    config.num_layers, config.moe.num_experts = 1, 2
    if name == "bailing_moe_v2":
        config.moe.num_groups = config.moe.top_groups = 1
        config.attention.bias = config.attention.output_bias = False
    listed = {line.split()[0]: [int(size) for size in line.split()[1:]] for line in expected.strip().splitlines()}
    assert {key: list(slot.shape) for key, slot in slots(config, FAMILIES[name]).items()} == listed
    # Queries, keys and values lie below each other in their one tensor.
    source = publish(tmp_path / "theirs", name, config)
    import_weights(source, tmp_path / "imported")
    ours = dict(model_of(tmp_path / "imported").named_parameters())
    theirs = tensors_of(source)["model.layers.0.attention.query_key_value.weight"]
    for key, rows in {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}.items():
        assert torch.equal(ours[f"layers.0.attention.{key}.weight"], theirs[rows])


# What each family cannot say; all other keys of the model are settings, the same in the whole family, or training's.
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_that_the_family_does_not_have_is_refused_by_key(name: str) -> None:
    """Every key of the model, changed alone, comes through a config.json, is refused by name, or means nothing."""
    family, config = FAMILIES[name], SHAPES[name]
    meaningless = {"mtp_loss", "residual_fp32"}
    meaningless |= {f"moe.{key}" for key in ("expert_bias_rate", "aux_loss", "z_loss", "capacity_factor")}
    for path in leaves(config):
        changed = copy.deepcopy(config)
        section, _, key = path.rpartition(".")
        holder = attrgetter(section)(changed) if section else changed
        value = getattr(holder, key)
        words = {"gqa": "mla", "mla": "gqa", "sigmoid": "softmax", "softmax": "sigmoid"}
        more = not value if isinstance(value, bool) else words[value] if isinstance(value, str) else (value or 0) + 1
        setattr(holder, key, more)
        try:
            changed.validate("")
        except UserError:
            continue  # no model at all
        try:
            back = config_from(config_to(changed, family, "here"), family, "here")
        except UserError as error:
            assert str(error).startswith("here: "), path
            assert f"model.{path}: is" in str(error), (path, str(error))
            continue
        same = attrgetter(path)(back) == attrgetter(path)(changed)
        if path in meaningless or not same:
            unused = config.attention.kind == "mla" and path in ("rope.fraction", *gqa_only())
            unused |= config.attention.kind == "gqa" and path in mla_only()
            unused |= path.startswith("rope.yarn.") and config.rope.yarn.factor == 1
            unused |= path == "dense_hidden_size" and config.dense_layers == 0
            assert path in meaningless or unused, path


def gqa_only() -> list[str]:
    return [f"attention.{key}" for key in ("num_kv_heads", "head_dim")]


def mla_only() -> list[str]:
    keys = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return [f"attention.{key}" for key in keys]


def leaves(config: object, prefix: str = "") -> list[str]:
    found = []
    for declared in fields(config):  # type: ignore[arg-type]
        value = getattr(config, declared.name)
        found += leaves(value, f"{prefix}{declared.name}.") if is_dataclass(value) else [prefix + declared.name]
    return found


def test_the_family_of_a_model_is_found() -> None:
    for name, config in SHAPES.items():
        assert family_of(config, FAMILIES, "here").name == name
    with pytest.raises(UserError, match=r"here: model: is of no family that can be exported \(.*model.moe.score: is"):
        family_of(ModelConfig(moe=copy.deepcopy(SHAPES["deepseek_v3"].moe), normalize_head=True), FAMILIES, "here")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: is 'gelu'; only 'silu' is supported"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"hidden_size": "wide"}, "hidden_size: 'wide' is no int"),
        ({"norm_topk_prob": 1}, "norm_topk_prob: 1 is no bool"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok: is 1; only 2 and more are supported"),
        ({"num_experts_per_tok": 999}, "model.moe.top_k: 999 is more than num_experts=256"),
        ({"scoring_func": "softmax"}, "scoring_func: is 'softmax'"),
        ({"rope_theta": None}, "rope_theta: is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: is of type 'linear'"),
        ({"rope_scaling": {**_YARN, "factor": "x"}}, "rope_scaling: cannot be read"),
        ({"rope_scaling": {**_YARN, "factor": 4, "mscale_all_dim": 1.0}}, "mscale_all_dim: is 1.0; it needs mscale"),
        ({"rope_scaling": {**_YARN, "factor": 4, "attention_factor": 1.0}}, "attention_factor: is set"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: is 0.5, which this family does not have"),
    ],
)
def test_a_config_that_we_cannot_compute_is_refused(change: dict, said: str) -> None:
    with pytest.raises(UserError, match=r"^config.json: ") as caught:
        config_from({**_DEEPSEEK, **change}, FAMILIES["deepseek_v3"], "config.json")
    assert said in str(caught.value)


def test_dense_layers_of_qwen3_are_the_first() -> None:
    family = FAMILIES["qwen3_moe"]
    assert config_from({**_QWEN, "mlp_only_layers": [0, 1]}, family, "here").dense_layers == 2
    with pytest.raises(UserError, match=r"mlp_only_layers: is \[3\]; only the first layers can be dense"):
        config_from({**_QWEN, "mlp_only_layers": [3]}, family, "here")


def test_the_layers_of_gpt_oss_alternate() -> None:
    with pytest.raises(UserError, match=r"layer_types: is \['full_attention'"):
        config_from({**_GPT_OSS, "layer_types": ["full_attention"] * 36}, FAMILIES["gpt_oss"], "here")


@pytest.mark.parametrize(
    ("keys", "left_out", "path", "value"),
    [
        (_QWEN, "norm_topk_prob", "moe.normalize", False),
        (_QWEN, "mlp_only_layers", "dense_layers", 0),
        (_QWEN, "head_dim", "attention.head_dim", 64),
        (_GLM_AIR, "attention_bias", "attention.bias", False),
        (_GLM_AIR, "use_qk_norm", "attention.qk_norm", False),
        (_GLM_AIR, "norm_topk_prob", "moe.normalize", True),
        (_GLM_AIR, "partial_rotary_factor", "rope.fraction", 0.5),
        (_GLM_AIR, "num_nextn_predict_layers", "mtp_layers", 0),
        (_DEEPSEEK, "rope_interleave", "rope.interleaved", True),
        (_DEEPSEEK, "rope_scaling", "rope.yarn.factor", 1.0),
        (_GPT_OSS, "swiglu_limit", "moe.swiglu_limit", 7.0),
        (_LING_PLUS, "norm_head", "normalize_head", False),
        (_LING_PLUS, "use_bias", "attention.output_bias", True),
        (_LING_MINI, "use_qk_norm", "attention.qk_norm", True),
        (_LING_MINI, "use_bias", "attention.output_bias", False),
    ],
)
def test_what_a_missing_key_means(keys: dict, left_out: str, path: str, value: object) -> None:
    """The default of the family's own config class, in transformers or beside its weights."""
    family = next(family for family in FAMILIES.values() if keys["model_type"] in family.model_types)
    config = config_from({key: given for key, given in keys.items() if key != left_out}, family, "here")
    assert attrgetter(path)(config) == value
