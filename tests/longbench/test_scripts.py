"""The scripts' own decisions: what a demo refuses, and which datasets a command line names."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

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


def test_dataset_groups_expand(script) -> None:
    pred = script("pred")
    names = pred.dataset_names(pred.parse_args(["--out", "x", "--datasets", "needle,english"]))
    assert names[0] == "needle" and len(names) == 17
    assert set(pred.dataset_names(pred.parse_args(["--out", "x"]))) == {
        "needle",
        "passage_retrieval",
        "code_completion",
    }
