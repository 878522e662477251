"""configs/tiny.yaml learns more than which token follows which."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT

TRAINED = "MOEBIUS_TINY_RUN"  # a finished run of it: .ci/run has one, and training it takes five minutes


@pytest.mark.slow  # it takes the whole run: at a tenth of it the bigram model, which needs no gradient, is ahead
@pytest.mark.timeout(1200)
def test_it_beats_the_bigram_model_on_the_held_out_files(tmp_path: Path) -> None:
    run = Path(os.environ[TRAINED]) if TRAINED in os.environ else trained(tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {k: v for record in records for k, v in record.items() if k in ("validation_loss", "bigram_loss")}
    # Measured: 4.03 against 4.13. On 49,000 held-out tokens half of that is still far outside the noise.
    assert found["validation_loss"] < found["bigram_loss"] - 0.05


def trained(run: Path) -> Path:
    """A run of it, with all cores."""
    command = [sys.executable, "-m", "launch.cli", "train", "--config", "configs/tiny.yaml", f"run_dir={run}"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=1200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run
