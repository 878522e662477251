"""benchmarks/cuda.sh without a GPU: that it says so, and that a dry pass goes through all of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "cuda.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    done = script(str(tmp_path / "folder"))
    assert done.returncode == 2
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert line.startswith("benchmarks/cuda.sh: backend: 'cuda' is not available here")
    assert not (tmp_path / "folder").exists()


@pytest.mark.slow
def test_a_dry_pass(tmp_path: Path) -> None:
    done = script("--dry", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    assert re.match(r"Conformance: \d+ passed", report)
    assert len(re.findall(r"^\| moebius \| \d+ \| \d+-\d+ \|", report, re.MULTILINE)) == 2, report
    assert len(re.findall(r"^\| attention \| \d+\.\d% \| \d+\.\d% \|$", report, re.MULTILINE)) == 2, report
