"""The report: scores, retention joined by row id, and files that other programs can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asymkv.longbench import predictions, report, report_tables
from asymkv.longbench.data import ids_sha256
from scripts.eval import main as evaluate


def write_arm(folder: Path, name: str, losses: dict[str, float], *, stored: int = 100) -> None:
    """A finished arm of one task with one record per loss."""
    rows = [
        {
            "_id": row_id, "index": index, "dataset": "qasper", "pred": "yes", "answers": ["yes" if index else "no"],
            "all_classes": None, "length": 10, "nll": loss, "gold_tokens": 3, "stored_bytes": stored, "full_bytes": 400,
            "peak_bytes": stored, "kept_ratio": 0.25, "prompt_tokens": 10, "prefill_seconds": 2.0, "decode_steps": 6,
            "decode_seconds": 3.0,
        }
        for index, (row_id, loss) in enumerate(losses.items())
    ]  # fmt: skip
    run = {
        "arm": name,
        "settings": {
            "protocol": "prompt", "without_context": name == "none", "model": "m", "dtype": "float32", "device": "cpu",
        },
        "conditions": {"device_name": "x", "commit": "abc", "versions": {"torch": "2", "transformers": "5"}},
        "results": {"datasets": {"qasper": {"rows": len(rows), "ids_sha256": ids_sha256(losses)}}},
    }  # fmt: skip
    (folder / name).mkdir(parents=True)
    (folder / name / "qasper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / name / "run.json").write_text(json.dumps(run), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_arm(tmp_path, "asymkv", {"b": 3.0, "a": 2.0})
    write_arm(tmp_path, "none", {"a": 4.0, "b": 5.0})
    write_arm(tmp_path, "full", {"a": 1.0, "b": 2.0}, stored=400)
    return tmp_path


def test_retention_joins_arms_by_row_id(folder: Path) -> None:
    scores = report.build_report(report.find_arms([folder]))
    assert list(scores) == ["full", "none", "asymkv"]
    # (4 - 2 + 5 - 3) / (4 - 1 + 5 - 2)
    assert scores["asymkv"]["retention"]["value"] == pytest.approx(4 / 6)
    assert scores["full"]["retention"]["value"] == 1.0 and scores["none"]["retention"]["value"] == 0.0
    retention = scores["asymkv"]["retention"]
    assert retention["low"] <= retention["value"] <= retention["high"] and retention["rows"] == 2


def test_scores_bytes_and_speed_are_of_all_records(folder: Path) -> None:
    arm = report.build_report(report.find_arms([folder / "asymkv"]))["asymkv"]
    assert arm["scores"] == {"qasper": 50.0} and arm["average"] == 50.0
    assert arm["stored_share"] == 0.25 and arm["stored_mb"] == pytest.approx(1e-4)
    assert arm["prefill_tokens_per_second"] == 5.0 and arm["decode_tokens_per_second"] == 2.0
    assert arm["retention"] is None


def test_arms_scored_on_different_answers_are_not_joined(folder: Path) -> None:
    path = folder / "full" / "qasper.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"gold_tokens": 3', '"gold_tokens": 4'), encoding="utf-8")
    with pytest.raises(ValueError, match="different lengths"):
        report.build_report(report.find_arms([folder]))


def test_arms_of_one_name_are_told_apart_by_folder(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_arm(other, "asymkv", {"a": 1.0})
    assert {arm.name for arm in report.find_arms([folder, other])} >= {"other/asymkv", f"{folder.name}/asymkv"}


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished arm"):
        report.find_arms([tmp_path])


def test_headline_is_the_mean_of_the_sixteen_english_tasks() -> None:
    from asymkv.longbench.data import CHINESE_TASKS, ENGLISH_TASKS

    scores = {**dict.fromkeys(ENGLISH_TASKS, 40.0), **dict.fromkeys(CHINESE_TASKS, 10.0)}
    assert predictions.averages(scores)["average_english_16"] == 40.0
    scores.pop("lcc")
    assert "average_english_16" not in predictions.averages(scores)


def test_files_are_readable_elsewhere(folder: Path, tmp_path: Path) -> None:
    found = report.find_arms([folder / "asymkv"])
    scores = report.build_report(found)
    scores["asymkv"]["average"] = float("nan")
    assert json.loads(report_tables.to_json(scores))["asymkv"]["average"] is None
    lines = report_tables.markdown(scores, found).splitlines()
    for first in ("| method | qasper", "| method | prefill s"):
        start = next(number for number, line in enumerate(lines) if line.startswith(first))
        table = lines[start : start + 3]
        assert all(table) and len({line.count("|") for line in table}) == 1 and lines[start + 3] == ""


def test_the_plot_is_written(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report_tables.plot(report.build_report(report.find_arms([folder])), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def change_setting(arm: Path, **settings: object) -> None:
    path = arm / "run.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(run | {"settings": run["settings"] | settings}), encoding="utf-8")


def test_arms_of_one_folder_with_other_settings_are_refused_by_name(folder: Path) -> None:
    change_setting(folder / "asymkv", **{"model": "other", "config.ratio": 0.5})
    with pytest.raises(ValueError, match=r"asymkv.*are of other settings: model differ"):
        report.find_arms([folder])


def test_references_of_another_model_are_not_used(folder: Path, tmp_path: Path, caplog) -> None:
    other = tmp_path / "other"
    write_arm(other, "h2o", {"a": 2.0, "b": 3.0})
    change_setting(other / "h2o", model="other")
    scores = report.build_report(report.find_arms([folder, other]))
    assert scores["asymkv"]["retention"] is not None and scores["h2o"]["retention"] is None
    assert "no R of h2o against full: model differ" in caplog.text


def test_records_that_are_not_those_of_the_run_are_refused(folder: Path) -> None:
    path = folder / "full" / "qasper.jsonl"
    whole = path.read_bytes()
    broken = {
        r"qasper.jsonl holds 1 records .*run.json says 2": whole[: whole.index(b"\n") + 1],
        r"qasper.jsonl:2 is not JSON": whole[:-20],
        r"qasper.jsonl:1: every number must be finite, found nll=nan": whole.replace(b"1.0", b"NaN", 1),
        r"qasper.jsonl:1: a record lacks answers": whole.replace(b'"answers"', b'"reference"', 1),
        r"qasper.jsonl:1: field 'pred' must be a string, found int 5": whole.replace(b'"pred": "yes"', b'"pred": 5', 1),
    }
    for message, content in broken.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            report.find_arms([folder])
    path.unlink()
    with pytest.raises(FileNotFoundError, match="qasper.jsonl does not exist, .*counts 2 rows"):
        report.find_arms([folder])


def test_costs_of_a_row_are_reported_where_records_tell_them(folder: Path) -> None:
    path = folder / "asymkv" / "qasper.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row, seconds in zip(rows, (1.0, 3.0), strict=True):
        row |= {"question_seconds": seconds, "wall_seconds": 9.0, "peak_rss_bytes": seconds * 1e6}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scores = report.build_report(report.find_arms([folder]))
    header, cells = report_tables.cost_rows(scores)
    named = {row[0]: dict(zip(header, row, strict=True)) for row in cells}
    assert named["asymkv"] == {
        "method": "asymkv", "prefill s": "2.00", "question s": "2.00", "decode s": "3.00", "row s": "9.00",
        "peak KV MB": "0.00", "peak RSS MB": "3.00", "of it in the row": "-", "peak device MB": "-",
    }  # fmt: skip
    assert named["full"]["peak RSS MB"] == "-"


def test_an_arm_that_is_not_finished_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "asymkv" / "run.json").unlink()
    (folder / "asymkv" / "records-0of1.jsonl").write_text("", encoding="utf-8")
    assert [arm.name for arm in report.find_arms([folder])] == ["full", "none"]
    assert "asymkv is not scored: its run is not finished" in caplog.text


@pytest.mark.parametrize("field", ["pred", "nll", "dataset"])
def test_a_record_that_lacks_what_scores_read_is_placed(folder: Path, field: str) -> None:
    path = folder / "full" / "qasper.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    del rows[1][field]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"qasper.jsonl:2: a record lacks {field}; it has"):
        report.find_arms([folder])


def test_a_run_without_answers_has_retention_alone(folder: Path) -> None:
    for path in folder.glob("*/run.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        run["settings"]["generate"] = False
        path.write_text(json.dumps(run), encoding="utf-8")
    for path in folder.glob("*/qasper.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "pred"}) + "\n" for r in rows))
    found = report.build_report(report.find_arms([folder]))["asymkv"]
    assert found["scores"] == {} and found["retention"]["value"] == pytest.approx(4 / 6)


def test_a_folder_may_hold_arms_and_predictions(folder: Path) -> None:
    (folder / "theirs").mkdir()
    line = {"pred": "yes", "answers": ["yes"], "all_classes": None, "length": 10}
    (folder / "theirs" / "qasper.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert set(evaluate([str(folder)])) == {"full", "none", "asymkv", "theirs"}


def test_an_interval_that_is_none_is_not_printed(tmp_path: Path) -> None:
    for name, loss in (("full", 1.0), ("none", 3.0), ("asymkv", 2.0)):
        write_arm(tmp_path, name, {"a": loss})
    rows = report_tables.table_rows(report.build_report(report.find_arms([tmp_path])))[1]
    assert "0.500" in rows[-1] and not any("nan" in cell for row in rows for cell in row)
