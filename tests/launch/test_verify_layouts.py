"""`moebius verify layouts`: which layouts there are, what becomes of those that fail, and the real thing (slow)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch import processes
from tests.launch.test_cli import moebius
from tests.small import write_inputs
from trainer.config.load import load_config
from trainer.verify import difference as differences
from trainer.verify.difference import Difference
from trainer.verify.layouts import Layout, Refused, every_layout, fitted, report

SAME = Difference(1e-7, 2e-7, 3e-7, 4e-6, True, True)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    path = write_inputs(tmp_path_factory.mktemp("layouts"))
    places = f"  source: text\n  paths: [{path.parent}/texts]\n  cache_dir: {path.parent}/cache\n"
    path.write_text(path.read_text().replace("  source: text\n", places))
    return str(path)


def test_every_factorisation_with_every_schedule_with_and_without_recomputation():
    found = every_layout(8)
    assert len(found) == len(set(found)) and {layout.world for layout in found} == {1, 8}
    shapes = {(layout.pp, layout.ep, layout.edp) for layout in found if layout.world == 8}
    assert len(shapes) == 10  # ordered factorisations of 8 into three
    # 6 schedules where there is a pipeline (6 shapes of 10), each twice, and one process with recomputation
    assert len(found) == 2 * (6 * 6 + 4) + 1
    assert len({layout.name for layout in found}) == len(found)


def test_of_one_process_there_is_recomputation():
    assert every_layout(1) == [Layout(recompute=True)]


def test_what_does_not_apply_has_its_reason(small):
    assert fitted(Layout("zbv", pp=2), load_config(small, []), small) == Refused(
        "parallel.pipeline: 4 stages (2 ranks under zbv) are more than model.num_layers=3; use fewer ranks or a "
        "schedule with fewer stages a rank"
    )
    refused = fitted(Layout(ep=16), load_config(small, ["train.global_batch_tokens=1024"]), small)
    assert isinstance(refused, Refused) and "num_experts=8 is not divisible by 16" in refused.reason


def test_micro_batches_become_smaller_where_a_layout_needs_more_of_them(small):
    """8 sequences; dualpipev on 2 ranks wants at least 4 micro-batches."""
    configs = (load_config(small, ["model.num_layers=4", size]) for size in OWN)
    assert [fitted(Layout("dualpipev", pp=2), config, small)[-1] for config in configs] == [
        "train.micro_batch_size=2",
        "train.micro_batch_size=2",
    ]


OWN = ("train.micro_batch_size=2", "train.micro_batch_size=4")


def test_the_report_says_which_layout_and_what():
    far = replace(SAME, weights=2e-3)
    outcomes = {
        Layout(recompute=True): SAME,
        Layout(ep=2): far,
        Layout(edp=2): replace(SAME, load_equal=False),
        Layout("zbv", pp=2): "rank 1 ended with exit code 1",
        Layout("1f1b", pp=2): Refused("too few layers"),
        Layout("1f1b", pp=2, recompute=True): Refused("too few layers"),
    }
    made = report(outcomes, {Layout(ep=2): "first forward: layers.1"}, 1e-5, {})
    assert made.verdict == "different"
    assert made.summary == "3 of 4 layouts differ from one process, first pp1-ep2-edp1: weights are 2.0e-03 apart."
    matrix, first, failed, refused = (section for section in made.sections if section.kind == "table")
    assert list(matrix.marks) == ["same", "different", "different", "different"]
    assert first.rows == [("pp1-ep2-edp1", "first forward: layers.1")]
    assert failed.rows == [("zbv-pp2-ep1-edp1", "rank 1 ended with exit code 1")]
    assert refused.rows == [("1f1b-pp2-ep1-edp1, 1f1b-pp2-ep1-edp1-recompute", "too few layers")]
    (heat,) = (section for section in made.sections if section.kind == "heatmap")
    assert heat.values[1] == pytest.approx([1e-2, 2e-2, 200, 4e-2]) and heat.values[3] == [None] * 4
    assert report({Layout(ep=2): SAME}, {}, 1e-5, {}).verdict == "same"


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": 1e-5},
        {"grad_norm": 1e-5},
        {"weights": 1e-5},
        {"moments": 1e-4},
        {"load_equal": False},
        {"bias_equal": False},
    ],
)
def test_each_difference_alone_is_one(wrong):
    assert report({Layout(ep=2): replace(SAME, **wrong)}, {}, 1e-5, {}).verdict == "different"


def test_a_figure_that_is_no_number_is_different():
    assert differences._relative(1.0, float("nan")) == float("inf") and differences._relative(0.0, 0.0) == 0


@pytest.fixture
def scripted(small, tmp_path, monkeypatch, capfd):
    """Runs the command with ranks that do what they are told instead of training."""
    started = processes.started

    def stand_in(module, *arguments, **more):
        assert module == "trainer.verify.turns"
        return started("tests.launch.layout_turns", *arguments, **more)

    monkeypatch.setattr(processes, "started", stand_in)
    monkeypatch.setattr(differences, "difference", lambda one, other, steps: SAME)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(what: dict[str, str], *more: str) -> tuple[int, dict, str]:
        (tmp_path / "script.json").write_text(json.dumps(what))
        monkeypatch.setenv("TURNS", str(tmp_path / "script.json"))
        out = str(tmp_path / "report.json")
        code, _, err = moebius(capfd, "verify", "layouts", "--config", small, "--world", "2", "--json", out, *more)
        assert not list(tmp_path.glob("moebius-layouts-*"))
        return code, json.loads(Path(out).read_text()) if code < 2 else {}, err

    return run


def test_all_layouts_are_trained_and_compared(scripted):
    code, found, _ = scripted({})
    assert code == 0 and found["verdict"] == "same" and len(found["sections"][1]["rows"]) == 9
    refused = found["sections"][2]["rows"]  # four schedules with four stages, of three layers
    assert len(refused) == 4 and all(layouts.count(",") == 1 for layouts, _ in refused)  # with recomputation too


def test_after_a_layout_that_fails_the_others_go_on(scripted):
    code, found, _ = scripted({"pp1-ep2-edp1": "crash", "gpipe-pp2-ep1-edp1": "hang"}, "--limit", "3")
    assert code == 1 and found["summary"].startswith("2 of 9 layouts differ")
    assert found["sections"][2]["title"] == "Did not train to the end"
    assert found["sections"][2]["rows"] == [
        ["pp1-ep2-edp1", "rank 1 ended with exit code 1: ZeroDivisionError: of this layout"],
        ["gpipe-pp2-ep1-edp1", "did not end within 3 seconds"],
    ]


def test_what_a_user_has_to_mend_is_one_line(scripted):
    code, _, err = scripted({"pp1-ep2-edp1": "LOCAL_RANK=1: this machine has 1 devices; start at most 1"})
    assert (code, err) == (2, "moebius: LOCAL_RANK=1: this machine has 1 devices; start at most 1\n")


def test_a_reference_that_does_not_train_is_one_line(scripted):
    code, _, err = scripted({"pp1-ep1-edp1": "hang"}, "--limit", "1")
    assert code == 2 and "one process does not train it: did not end within 1 seconds" in err


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["--world", "0"], "argument --world: '0' is not a whole number of 1 or more"),
        (["--world", "2", "model.moe.top_k=99"], "model.moe.top_k"),
        (["--world", "7", "train.global_batch_tokens=32"], "--world 7: no layout applies: train.global_batch_tokens: "),
    ],
)
def test_mistakes_are_one_line(small, capfd, arguments, problem):
    code, _, err = moebius(capfd, "verify", "layouts", "--config", small, *arguments)
    assert code == 2 and problem in err and err.count("\n") == 1


def test_a_launcher_is_refused(small, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, _, err = moebius(capfd, "verify", "layouts", "--config", small, "--world", "2")
    assert code == 2 and "start it without a launcher" in err


@pytest.mark.slow
def test_the_layouts_of_two_processes(small, tmp_path, capfd):
    out = str(tmp_path / "report.json")
    arguments = ["--config", small, "--world", "2", "--steps", "3", "model.num_layers=4"]
    code, _, err = moebius(capfd, "verify", "layouts", *arguments, "--json", out)
    found = json.loads(Path(out).read_text())
    assert code == 0, found["summary"] + err
    assert len(found["sections"][1]["rows"]) == 17 and set(found["sections"][1]["marks"]) == {"same"}
