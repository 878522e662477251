"""In a process of its own: what an import and an export of weights of some size hold in memory.

Reports bytes that tests/distributed/test_continued.py judges.
"""

import copy
import sys
from pathlib import Path

import torch

from tests.distributed.checkpoint_cases import peak_growth
from tests.distributed.ranks import report
from tests.published import SHAPES, publish
from trainer.convert import export_weights, import_weights


def main() -> None:
    folder = Path(sys.argv[1])
    config = copy.deepcopy(SHAPES["gpt_oss"])
    config.vocab_size, config.hidden_size, config.moe.num_experts, config.moe.expert_hidden_size = 8192, 1024, 24, 1024
    source = publish(folder / "theirs", "gpt_oss", config, torch.bfloat16)
    publish(folder / "small", "gpt_oss", SHAPES["gpt_oss"])
    import_weights(folder / "small", folder / "small-imported")  # what is imported at the first call is there
    export_weights(str(folder / "small-imported"), folder / "small-ours", None, None, 10**9)
    files = [path.stat().st_size for path in source.glob("*.safetensors")]
    importing = peak_growth(lambda: import_weights(source, folder / "imported"))
    exporting = peak_growth(lambda: export_weights(str(folder / "imported"), folder / "ours", None, None, max(files)))
    written = [path.stat().st_size for path in (folder / "ours").glob("*.safetensors")]
    report({"files": files, "written": written, "importing": importing, "exporting": exporting})


if __name__ == "__main__":
    main()
