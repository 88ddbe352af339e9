"""The benchmark of scoring: every metric is timed on predictions in which there is something to find."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from longbench_files import load_script

from asymkv.longbench import metrics, scoring_speed


def test_every_metric_of_longbench_is_timed() -> None:
    timed = {getattr(metrics, name) for name in scoring_speed.makers(scoring_speed.Samples())}
    own = {metrics.needle_score}
    assert set(metrics.DATASET_METRICS.values()) - own == timed - {metrics.rouge_l_reference}


def test_the_script_writes_times_scores_and_conditions(tmp_path: Path) -> None:
    for package in ("jieba", "rouge", "rouge_score"):
        pytest.importorskip(package)
    load_script("bench_scoring").main(["--out", str(tmp_path), "--count", "21", "--package-count", "1"])
    with (tmp_path / "scoring.csv").open(encoding="utf-8") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert len(rows) == 10 + 1 + 2 and all(0 < float(row["mean_score"]) < 1 for row in rows.values())
    assert {row["predictions"] for row in rows.values()} == {"21", "1"}
    assert float(rows["rouge_score by its package"]["largest_difference"]) < 1e-12
    conditions = json.loads((tmp_path / "conditions.json").read_text(encoding="utf-8"))
    assert conditions["versions"]["rouge"] and conditions["seed"] == 0
