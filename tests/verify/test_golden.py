"""The golden trace of the repository, through the commands; with other vector units than this machine's as well."""

import json
import sys
from pathlib import Path

from tests.distributed.ranks import ROOT, environment, run_alone

GOLDEN = "tests/verify/golden"
# What torch, oneDNN and MKL would use on an old CPU. It changes the last bits of the initial weights too.
OLD_CPU = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}


def moebius(*arguments: str, **more: str) -> tuple[int, str]:
    return run_alone([sys.executable, "-m", "launch.cli", "verify", *arguments], ROOT, environment(**more))


def test_the_golden_trace_holds_here_and_with_other_vector_units(tmp_path: Path) -> None:
    for name, where in (("here", {}), ("old", OLD_CPU)):
        out = str(tmp_path / name)
        code, output = moebius("record", "--config", f"{GOLDEN}/golden.yaml", "--out", out, "--steps", "2", **where)
        assert code == 0, output
        code, output = moebius("compare", GOLDEN, out)
        assert code == 0, output


def test_a_changed_model_is_named_and_written_down(tmp_path: Path) -> None:
    out = str(tmp_path / "other")
    changed = ["--steps", "2", "model.moe.scale=2.001"]
    code, output = moebius("record", "--config", f"{GOLDEN}/golden.yaml", "--out", out, *changed)
    assert code == 0, output
    files = ["--html", str(tmp_path / "report.html"), "--json", str(tmp_path / "report.json")]
    code, output = moebius("compare", GOLDEN, out, *files)
    assert code == 1, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "different"
    assert report["summary"].startswith("First difference: first forward, step 1: layers.1.moe.router: ")
    assert report["about"]["different keys"] == "model.moe.scale: 2.0 and 2.001"
    assert "layers.1.moe.router" in (tmp_path / "report.html").read_text()


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    code, output = moebius("compare", GOLDEN, str(tmp_path))
    assert code == 2 and output.count("\n") == 1 and "holds no trace" in output
    (tmp_path / "trace.json").write_text("{}")
    code, output = moebius("compare", str(tmp_path), GOLDEN)
    assert code == 2 and output.count("\n") == 1 and "record it again" in output


def test_the_golden_trace_is_small_and_names_no_place_of_a_machine() -> None:
    files = list((ROOT / GOLDEN).iterdir())
    assert sum(file.stat().st_size for file in files) < 200_000
    header = json.loads((ROOT / GOLDEN / "trace.json").read_text())
    assert not [value for value in header["config"].values() if isinstance(value, str) and value.startswith(("/", "~"))]
