"""From transformers into a pipeline of experts, twenty steps of training, and back into transformers."""

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.published import model_of, write_tokenizer
from tests.small import write_inputs
from trainer import checkpoint
from trainer.convert import export_weights, import_weights
from trainer.verify.difference import difference

pytestmark = pytest.mark.slow  # a minute; tests/trainer/convert does the same on one process
STEPS = 20
BOUND = 1e-5
KEYS = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "initializer_range": 0.15,  # scores far apart: a near-tie that rounding could flip is then very unlikely
    "eos_token_id": 0,
}
CONFIG = """
base: weights/config.yaml
data: {{source: text, sequence_length: 32, validation_fraction: 0.2}}
optimizer: {{lr: 0.003}}
schedule: {{warmup_steps: 3}}
train: {{steps: {steps}, global_batch_tokens: 256, micro_batch_size: 1, eval_every: 0, eval_sequences: 4}}
metrics: {{tensorboard: false, peak_tflops: 0.1}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported weights, and what one process and four have made of them."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    folder = tmp_path_factory.mktemp("continued")
    torch.manual_seed(0)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**KEYS))
    theirs.save_pretrained(folder / "theirs", max_shard_size="50KB")
    write_tokenizer(folder / "theirs" / "tokenizer.json")
    import_weights(folder / "theirs", folder / "weights")
    path = write_inputs(folder)
    path.write_text(CONFIG.format(steps=STEPS))
    four = "parallel.pipeline=2 parallel.expert=2 parallel.schedule=zbv"
    for ranks, name, layout in ((1, "one", ""), (4, "four", four)):
        line = f"run_dir={folder}/{name} {layout}"
        assert run_ranks(ranks, "tests.distributed.train_many", str(path), line) == [["done"]] * ranks
    return folder


def test_four_ranks_go_on_as_one_does(runs: Path) -> None:
    found = difference(runs / "one", runs / "four", STEPS)
    assert found.within(BOUND), found


def test_what_was_trained_is_the_same_model_in_transformers(runs: Path) -> None:
    """Loss of a batch, in fp32: the same sums in another order."""
    from transformers import DeepseekV3ForCausalLM

    export_weights(str(runs / "four"), runs / "ours", None, None, 50_000)
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(
        runs / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    newest = checkpoint.newest(runs / "four")
    assert newest is not None and checkpoint.step_of(newest) == STEPS
    tokens = torch.randint(KEYS["vocab_size"], (4, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([tokens[:, 1:], tokens.new_full((4, 1), -100)], 1)
    with torch.no_grad():
        ours, before = (model_of(folder)(tokens, labels_BS=labels) for folder in (newest, runs / "weights"))
        expected = theirs(input_ids=tokens, labels=tokens).loss
    assert abs(ours - expected) < BOUND * expected
    assert abs(ours - before) > 1e-2 * expected  # twenty steps have changed it


def test_no_more_than_a_file_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout that needs most: all experts of a layer are one tensor, and are transposed."""
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")  # freed memory goes back, so that what is resident is in use
    (found,) = run_ranks(1, "tests.distributed.convert_cases", str(tmp_path))
    slack = 128 << 20  # three blocks of 32 MiB: as read, as fp32, as written; and 32 MiB for all else
    largest, everything = max(found["files"]), sum(found["files"])
    assert 2 * everything > 2 * (2 * largest + slack)  # all weights in fp32 are far above the bounds
    assert found["importing"] < 2 * largest + slack  # pages of the file that were read, and blocks
    assert found["exporting"] < 2 * max(found["written"]) + slack  # a file, and a tensor in two orders
