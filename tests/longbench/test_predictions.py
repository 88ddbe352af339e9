"""Folders of ``<task>.jsonl`` that other programs wrote: scores, length buckets, and what is wrong with a line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
from longbench_files import load_script, write_rows

from asymkv.longbench import predictions

YES = {"pred": "yes", "answers": ["no", "yes"], "all_classes": None, "length": 100}
NO = {"pred": "no", "answers": ["yes"], "all_classes": None, "length": 9000}
FOOD = {"pred": "\nFood\nDate", "answers": ["Food"], "all_classes": ["Food", "Date"], "length": 5000}


@pytest.fixture
def scoring() -> ModuleType:
    return load_script("eval")


def test_a_plain_folder_is_scored_as_longbench_does(tmp_path: Path) -> None:
    write_rows(tmp_path / "qasper.jsonl", [YES, NO, NO])
    write_rows(tmp_path / "trec.jsonl", [FOOD])
    found = predictions.score_folder(tmp_path)
    assert found["scores"] == {"qasper": 33.33, "trec": 100.0} and found["average"] == 66.66
    assert found["rows"] == {"qasper": 3, "trec": 1} and "scores_e" not in found


def test_buckets_are_by_the_rows_length(tmp_path: Path) -> None:
    write_rows(tmp_path / "qasper.jsonl", [YES, {**YES, "length": 4000}, {**NO, "length": 7999}, NO])
    buckets = predictions.score_folder(tmp_path, by_length=True)["scores_e"]["qasper"]
    assert buckets == {"0-4k": 100.0, "4-8k": 50.0, "8k+": 0.0}


def test_an_empty_prediction_scores_zero(tmp_path: Path) -> None:
    empty = {**YES, "pred": ""}
    for task, row in (("qasper", empty), ("gov_report", empty), ("trec", {**FOOD, "pred": ""}), ("lcc", empty)):
        write_rows(tmp_path / f"{task}.jsonl", [row])
    write_rows(tmp_path / "passage_count.jsonl", [{**empty, "answers": ["3"]}])
    assert set(predictions.score_folder(tmp_path)["scores"].values()) == {0.0}


SQUAD = {"pred": "the cat", "answers": ["cat"], "is_impossible": False, "length": 5000}
NUMBER = {"pred": "12", "answers": ["12"], "task": "scbench_passkey"}


def test_datasets_of_suites_are_scored_as_in_a_run(tmp_path: Path) -> None:
    write_rows(tmp_path / "squad.jsonl", [SQUAD, {**SQUAD, "pred": "a dog", "length": 10}])
    write_rows(tmp_path / "scbench_summary_with_needles.jsonl", [{"turns": [NUMBER, {**NUMBER, "pred": "no"}]}])
    found = predictions.score_folder(tmp_path)
    assert found["scores"] == {"scbench_summary_with_needles": 50.0, "squad": 50.0}
    assert found["details"]["scbench_summary_with_needles"]["turn 2"] == 0.0
    (tmp_path / "scbench_summary_with_needles.jsonl").unlink()
    buckets = predictions.score_folder(tmp_path, by_length=True)["scores_e"]["squad"]
    assert (buckets["0-4k"], buckets["4-8k"]) == (0.0, 100.0) and math.isnan(buckets["8k+"])


def test_references_may_be_a_letter_or_a_number_alone(tmp_path: Path) -> None:
    levels = {"difficulty": "easy", "length_group": "short"}
    right, wrong = ({"pred": p, "answers": ["B"], **levels} for p in ("The correct answer is (B)", "B or so"))
    write_rows(tmp_path / "longbench_v2.jsonl", [right, wrong])
    write_rows(tmp_path / "gsm8k.jsonl", [{"pred": "#### 7", "answers": ["7"]}, {"pred": "no", "answers": ["#### 7"]}])
    assert set(predictions.score_folder(tmp_path)["scores"].values()) == {50.0}


def test_squad_scores_empty_words_as_its_two_scorers_do(tmp_path: Path) -> None:
    """1.1 takes references as they are and gives no F1 against an empty side; 2.0 drops empty references."""
    rows = [{**SQUAD, "pred": "A", "answers": ["A"]}, {**SQUAD, "pred": "", "answers": ["a", "foo"]}]
    for name, f1, exact in (("squad", 0.0, 100.0), ("squad_v2", 50.0, 50.0)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / f"{name}.jsonl", rows)
        found = predictions.score_folder(tmp_path / name)
        assert (found["scores"][name], found["details"][name]["exact_match"]) == (f1, exact), name


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("squad", {**SQUAD, "is_impossible": None}, r"squad.jsonl:1: a prediction lacks is_impossible"),
        ("squad", {**SQUAD, "answers": []}, r"squad.jsonl:1: field 'answers' is empty"),
        ("scbench_kv", {"turns": []}, r"kv.jsonl:1: field 'turns' must be a list of objects, found list \[\]"),
        ("scbench_kv", {"turns": [NUMBER, {**NUMBER, "pred": 1}]}, r"kv.jsonl:1, turn 2: field 'pred' must be a str"),
        ("scbench_kv", {"turns": [{"pred": "1"}]}, r"kv.jsonl:1, turn 1: a prediction lacks answers"),
        ("squad", {**SQUAD, "is_impossible": "false"}, r"squad.jsonl:1: field 'is_impossible' must be true or false"),
        ("gsm8k", {"pred": "no idea", "answers": ["no marker"]}, r"gsm8k.jsonl:1: field 'answers' must be a solution"),
        ("scbench_mf", {"turns": [{**NUMBER, "answers": ["x"]}]}, r"turn 1: field 'answers' must be a number"),
        ("scbench_choice_eng", {"turns": [{**NUMBER, "answers": ["a text"]}]}, r"text and its letter, found list"),
        ("scbench_summary_with_needles", {"turns": [{**NUMBER, "task": "foo"}]}, r"turn 1: field 'task' must be"),
        ("longbench_v2", {"pred": "whatever", "answers": ["E"], "difficulty": "easy", "length_group": "short"},
         r"longbench_v2.jsonl:1: field 'answers' must give one of the letters A, B, C, D, found str 'E'"),
        ("trec", {**FOOD, "all_classes": []}, r"trec.jsonl:1: field 'all_classes' must name the classes"),
        ("trec_e", {**FOOD, "length": -1}, r"trec_e.jsonl:1: field 'length' must not be below 0, found -1"),
    ],
)  # fmt: skip
def test_bad_predictions_of_suites_are_placed(task: str, row: dict, message: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"{task}.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        predictions.score_folder(tmp_path)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("qasper", {"pred": None}, r"qasper.jsonl:2: a prediction lacks pred; it has pred, answers"),
        ("qasper", {"pred": 3}, r"qasper.jsonl:2: field 'pred' must be a string, found int 3"),
        ("qasper", {"answers": "yes"}, r"qasper.jsonl:2: field 'answers' must be a list of strings, found str 'yes'"),
        ("qasper", {"answers": ["yes", 1]}, r"qasper.jsonl:2: field 'answers' must be a list of strings"),
        ("qasper_e", {"length": None}, r"qasper_e.jsonl:2: a prediction lacks length"),
        ("qasper_e", {"length": 4.5}, r"qasper_e.jsonl:2: field 'length' must be a whole number, found float"),
        ("trec", {"all_classes": None}, r"trec.jsonl:2: a prediction lacks all_classes"),
        ("passage_retrieval_en", {"answers": ["3"]}, r"en.jsonl:2: field 'answers': .*'Paragraph N', got '3'"),
        ("quasper", {}, r"quasper.jsonl: no metric for dataset 'quasper'; known: .*qasper"),
    ],
)
def test_bad_lines_are_named(task: str, change: dict, message: str, tmp_path: Path) -> None:
    good = {**FOOD, "answers": ["Paragraph 3"]}
    write_rows(tmp_path / f"{task}.jsonl", [good, {**good, **change}])
    with pytest.raises(ValueError, match=message):
        predictions.score_folder(tmp_path)


def test_a_cut_file_is_named_and_an_empty_one_too(tmp_path: Path) -> None:
    path = tmp_path / "qasper.jsonl"
    path.write_text(json.dumps(YES) + "\n" + json.dumps(NO)[:30], encoding="utf-8")
    with pytest.raises(ValueError, match=r"qasper.jsonl:2 is not JSON: .*a file that was cut"):
        predictions.score_folder(tmp_path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="qasper.jsonl holds no predictions"):
        predictions.score_folder(tmp_path)


def test_the_script_scores_plain_folders_beside_each_other(scoring: ModuleType, tmp_path: Path) -> None:
    for name, rows in (("ours", [YES, YES]), ("theirs", [YES, NO])):
        (tmp_path / "pred" / name).mkdir(parents=True)
        write_rows(tmp_path / "pred" / name / "qasper.jsonl", rows)
    scores = scoring.main([str(tmp_path / "pred"), "--e"])
    assert {name: entry["scores"]["qasper"] for name, entry in scores.items()} == {"ours": 100.0, "theirs": 50.0}
    buckets = {name: entry["scores_e"]["qasper"] for name, entry in scores.items()}
    assert math.isnan(buckets["ours"]["8k+"]) and buckets["theirs"]["8k+"] == 0
    written = json.loads((tmp_path / "pred" / "report.json").read_text(encoding="utf-8"))
    assert written["ours"]["scores_e"]["qasper"]["8k+"] is None
    table = (tmp_path / "pred" / "report.md").read_text(encoding="utf-8")
    assert "| theirs | 50.00 | 50.00 |" in table and "| theirs | qasper | 100.00 | - | 0.00 |" in table


def test_a_folder_without_either_is_refused(scoring: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished arm"):
        scoring.main([str(tmp_path)])
