"""The scripts' own decisions: what a demo refuses, and which datasets a command line names."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import tiny_model, tiny_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a script by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def demo_scores(*, needle: float = 100.0, share: float = 0.28) -> dict:
    full = {"scores": {"needle": needle}, "stored_share": 1.1}
    return {"full": full, "none": full, "asymkv": {"scores": {"needle": 0.0}, "stored_share": share}}


def test_the_demo_fails_loudly_on_a_broken_model_or_an_uncompressed_arm(script) -> None:
    problems = script("demo").problems
    assert problems(demo_scores(), 0.25) == []
    assert "full cache finds only 40 %" in problems(demo_scores(needle=40.0), 0.25)[0]
    assert "asymkv stores 31.0 %" in problems(demo_scores(share=0.31), 0.25)[0]
    assert problems(demo_scores(share=0.31), 0.5) == []


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny random model and its tokenizer, as a folder."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("protocol", ["prompt", "context"])
def test_compare_prints_both_answers_and_goes_on_where_it_stopped(
    script, tiny_folder, tmp_path, capsys, protocol
) -> None:
    compare = script("compare")
    args = ["--model", str(tiny_folder), "--ratio", "0.3", "--context", " ".join(f"w{i % 97}" for i in range(200)),
            "--question", "w3 w5", "--max-new-tokens", "5", "--device", "cpu", "--protocol", protocol,
            "--out", str(tmp_path / "answers.json"), "--methods"]  # fmt: skip
    assert compare.main([*args, "h2o"]) == 0
    first = json.loads((tmp_path / "answers.json").read_text())["answers"]
    assert compare.main([*args, "h2o,kvpress_knorm,razor"]) == 1
    out = capsys.readouterr()
    assert "not run: razor" in out.err and "find_retrieval_heads" in out.err
    assert "kvpress_knorm" in out.out and "full cache" in out.out
    answers = json.loads((tmp_path / "answers.json").read_text())["answers"]
    assert answers[:2] == first and [a["method"] for a in answers] == ["full", "h2o", "kvpress_knorm"]
    assert answers[0]["kept_ratio"] == 1 and answers[2]["kept_ratio"] == pytest.approx(0.3, abs=0.01)
    with pytest.raises(ValueError, match="other settings.*ratio"):
        compare.main([*args[:2], "--ratio", "0.5", *args[4:], "h2o"])


def test_dataset_groups_expand(script) -> None:
    pred = script("pred")
    names = pred.dataset_names(pred.parse_args(["--out", "x", "--datasets", "needle,english"]))
    assert names[0] == "needle" and len(names) == 17
    assert set(pred.dataset_names(pred.parse_args(["--out", "x"]))) == {
        "needle",
        "passage_retrieval",
        "code_completion",
    }
