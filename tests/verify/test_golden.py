"""The golden trace of the repository, through the commands; with other vector units than this machine's as well."""

import json
import sys
from pathlib import Path

import pytest

from launch.cli import main
from tests.distributed.ranks import ROOT, environment, run_alone, run_ranks

GOLDEN = ROOT / "tests" / "verify" / "golden"
# What torch, oneDNN and MKL would use on an old CPU. It changes the last bits of the initial weights too.
OLD_CPU = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}


def arguments(out: Path, *overrides: str) -> list[str]:
    return ["--config", f"{GOLDEN}/golden.yaml", "--out", str(out), "--steps", "2", *overrides]


def test_the_golden_trace_holds_on_any_layout(tmp_path: Path) -> None:
    """Two ranks that share experts; .ci/run records it on one."""
    codes = run_ranks(2, "tests.verify.record_command", *arguments(tmp_path / "two", "parallel.expert=2"))
    assert codes == [0, 0]
    assert main(["verify", "compare", str(GOLDEN), str(tmp_path / "two")]) == 0


def test_a_changed_model_is_named_and_written_down(tmp_path: Path) -> None:
    assert run_ranks(1, "tests.verify.record_command", *arguments(tmp_path / "x", "model.moe.scale=2.001")) == [0]
    files = ["--html", str(tmp_path / "report.html"), "--json", str(tmp_path / "report.json")]
    assert main(["verify", "compare", str(GOLDEN), str(tmp_path / "x"), *files]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "different"
    assert report["summary"].startswith("First difference: first forward, step 1: layers.1.moe.router: ")
    assert report["about"]["different keys"] == "model.moe.scale: 2.0 and 2.001"
    assert "layers.1.moe.router" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_golden_trace_holds_with_other_vector_units(tmp_path: Path) -> None:
    record = [sys.executable, "-m", "launch.cli", "verify", "record", *arguments(tmp_path / "old")]
    code, output = run_alone(record, ROOT, environment(**OLD_CPU))
    assert code == 0, output
    assert main(["verify", "compare", str(GOLDEN), str(tmp_path / "old")]) == 0


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "compare", str(GOLDEN), str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"moebius: {tmp_path}: holds no trace ({tmp_path}/trace.json is missing); give a folder that `moebius verify "
        "record --out` wrote\n"
    )
    (tmp_path / "trace.json").write_text("{}")
    assert main(["verify", "compare", str(tmp_path), str(GOLDEN)]) == 2
    assert "is a trace of format None, not 1; record it again" in capsys.readouterr().err
    (tmp_path / "trace.json").write_text((GOLDEN / "trace.json").read_text())
    (tmp_path / "trace.npz").write_bytes((GOLDEN / "trace.npz").read_bytes()[:5000])
    assert main(["verify", "compare", str(tmp_path), str(GOLDEN)]) == 2
    assert "the trace cannot be read" in capsys.readouterr().err


def test_the_golden_trace_is_small_and_names_no_place_of_a_machine() -> None:
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 200_000
    header = json.loads((GOLDEN / "trace.json").read_text())
    assert not [value for value in header["config"].values() if isinstance(value, str) and value.startswith(("/", "~"))]


def test_a_trace_is_never_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    before = (GOLDEN / "trace.json").stat().st_mtime_ns
    assert main(["verify", "record", *arguments(GOLDEN)]) == 2
    assert "holds a trace already; remove its trace.json, or choose another folder" in capsys.readouterr().err
    assert (GOLDEN / "trace.json").stat().st_mtime_ns == before


def test_a_file_is_no_folder_of_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "compare", str(GOLDEN / "trace.json"), str(GOLDEN)]) == 2
    assert "trace.json: holds no trace" in capsys.readouterr().err
