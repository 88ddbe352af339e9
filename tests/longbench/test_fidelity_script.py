"""``scripts/fidelity.py`` end to end on a tiny random model: resume, shards, refusal, and reports."""

import csv
import dataclasses
import json

import pytest
import yaml
from longbench_files import load_script, other_process

from asymkv.longbench import fidelity, peers, sample
from asymkv.longbench.arms import StoredTooMuchError
from asymkv.longbench.fidelity_experiment import join_experiments, load_experiment
from asymkv.longbench.records import RecordFolder

ARMS = [
    {"name": "full", "method": "full"},
    {"name": "window", "method": "streaming_llm"},
    {"name": "merge", "method": "asymkv", "compare": ["window"]},
]


def needle_row(index):
    filler = "the quick brown fox jumps over the lazy dog. " * (4 + index)
    context = f"{filler}The code is {index}{index}7. {filler}"
    return {
        "_id": f"row{index}", "context": context, "input": "What is the code?", "answers": [f"{index}{index}7"],
        "depth": 0.5, "target_len": 100,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    """A tiny model, two rows of two tasks, one text, an experiment and its sample."""
    root = tmp_path_factory.mktemp("fidelity")
    (root / "model").symlink_to(tiny_folder)
    rows = {"needle": [needle_row(i) for i in (0, 1)], "code_completion": [needle_row(i) for i in (2, 3)]}
    for row in rows["code_completion"]:
        del row["depth"]
    for task, table in rows.items():
        (root / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    ids = {task: [row["_id"] for row in table] for task, table in rows.items()}
    table = {"max_prompt_tokens": 700, "sha256": sample.sample_sha256(ids), "tasks": ids}
    (root / "sample.json").write_text(json.dumps(table), encoding="utf-8")
    (root / "texts").mkdir()
    (root / "texts" / "story.txt").write_text("one two three four five six seven. " * 12, encoding="utf-8")
    experiment = {
        "name": "tiny", "sample": "sample.json", "ratios": [0.5], "arms": ARMS,
        "texts": {"prefix_tokens": 120, "target_tokens": 20, "windows": 2},
        "defaults": {"window_size": 8, "decode_interval": 0},
    }  # fmt: skip
    (root / "tiny.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return root


def run(folder, out, *extra):
    base = ["--experiment", str(folder / "tiny.yaml"), "--data-dir", str(folder), "--out", str(out)]
    base += ["--model", str(folder / "model"), "--max-length", "900", "--no-chat-template", "--dtype", "float32"]
    load_script("fidelity").main([*base, *extra])


def read_records(out):
    return RecordFolder(out, fidelity.record_key).read()


def values(out):
    return {fidelity.record_key(r): r["nll"] for r in read_records(out)}


@pytest.fixture(scope="module")
def finished(folder):
    """A whole run: rows and texts."""
    out = folder / "whole"
    run(folder, out, "--texts", str(folder / "texts"))
    return out


def test_every_cell_of_every_row_and_window_is_recorded_once(finished):
    records = read_records(finished)
    rows = [r for r in records if r["kind"] == "row"]
    assert len(rows) == 4 * 4  # none, full, window, merge
    assert len([r for r in records if r["kind"] == "window"]) == 2 * 3
    assert all(r["rows_max"] < r["prompt_tokens"] for r in rows if r["ratio"])
    assert {r["arm"] for r in rows if "found" in r} == {"none", "full", "window", "merge"}
    assert not any("answers" in r or "pred" in r for r in records)


def test_the_full_cache_diverges_nowhere_and_is_larger(finished):
    with (finished / "results.csv").open(encoding="utf-8") as file:
        table = {(row["arm"], float(row["ratio"])): row for row in csv.DictReader(file)}
    full = table["full", 1.0]
    assert float(full["text_kl"]) == 0.0
    assert float(full["text_perplexity_difference"]) == 0.0
    assert float(table["merge", 0.5]["share_of_stock_bytes"]) < float(full["share_of_stock_bytes"])
    assert float(table["merge", 0.5]["text_kl"]) != 0.0


def test_the_report_says_what_was_run(finished):
    text = (finished / "results.md").read_text(encoding="utf-8")
    settings = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert settings["settings"]["protocol"] == "context"
    assert settings["settings"]["arms"]["merge"]["method"] == "asymkv"
    assert settings["sessions"][0]["threads"] == 1
    assert (finished / "needles.png").read_bytes().startswith(b"\x89PNG")
    assert "| merge | window | 0.5 |" in text


def test_planted_facts_are_generated_at_any_length(folder, tmp_path):
    options = {"ruler": {"lengths": [700, 1000], "rows": 1, "haystack": "noise"}}
    tasks = ["--sample", "all", "--tasks", "ruler_niah_multikey", "--options", json.dumps(options)]
    run(folder, tmp_path, *tasks, "--arms", "window")
    rows = read_records(tmp_path)
    asked = {(arm, length) for arm in ("none", "full", "window") for length in (700, 1000)}
    assert {(r["arm"], r["target_len"]) for r in rows} == asked
    assert all("found" in r and "depth" in r and not r["removed_tokens"] for r in rows)
    assert (tmp_path / "needles.png").exists()
    with pytest.raises(ValueError, match="ids_sha256 differ"):
        run(folder, tmp_path, *tasks[:-1], json.dumps({"ruler": {**options["ruler"], "seed": 1}}), "--arms", "window")


def test_a_finished_run_measures_nothing_again(folder, finished, monkeypatch):
    before = (finished / "records-0of1.jsonl").read_bytes()
    monkeypatch.setattr(fidelity, "measure", None)
    monkeypatch.setattr(fidelity, "compress", None)
    run(folder, finished, "--texts", str(folder / "texts"))
    assert (finished / "records-0of1.jsonl").read_bytes() == before


def test_a_killed_run_goes_on_after_its_last_whole_line(folder, finished, tmp_path):
    lines = (finished / "records-0of1.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run-0of1.json").write_bytes((finished / "run-0of1.json").read_bytes())
    (tmp_path / "records-0of1.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:30])
    run(folder, tmp_path, "--texts", str(folder / "texts"))
    assert values(tmp_path) == values(finished)
    assert (tmp_path / "records-0of1.jsonl").read_bytes().startswith(b"".join(lines[:9]))


def test_two_shards_make_one_run(folder, finished, tmp_path):
    for shard in ("0/2", "1/2"):
        run(folder, tmp_path, "--shard", shard)
    whole = {key: nll for key, nll in values(finished).items() if key[0] == "row"}
    assert values(tmp_path) == whole
    assert len(json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["sessions"]) == 2


def test_a_shard_that_is_being_measured_is_refused_and_another_is_not(folder, tmp_path):
    with other_process(tmp_path / "records-0of2.jsonl") as process:
        assert process.stdout.readline() == "held\n"
        for shard in ("0/2", "0/1"):
            with pytest.raises(ValueError, match="records-0of2.jsonl is being written by another process"):
                run(folder, tmp_path, "--shard", shard)
        assert not read_records(tmp_path)
        run(folder, tmp_path, "--shard", "1/2")
        process.kill()
    with other_process(tmp_path / "records-1of2.jsonl") as process:  # whose run is over
        assert process.stdout.readline() == "held\n"
        process.kill()


@pytest.mark.parametrize(
    ("extra", "named"), [(["--protocol", "prompt"], "protocol"), (["--tasks", "needle"], "ids_sha256")]
)
def test_a_folder_of_another_setting_is_refused(folder, finished, extra, named):
    with pytest.raises(ValueError, match=named):
        run(folder, finished, *extra)


def test_max_rows_and_arms_limit_a_smoke_run(folder, tmp_path):
    run(folder, tmp_path, "--max-rows", "1", "--tasks", "needle", "--arms", "window")
    assert {key[3] for key in values(tmp_path)} == {"none", "full", "window"}
    assert {key[2] for key in values(tmp_path)} == {"row0"}


def test_a_shared_prefill_gives_the_same_numbers_but_no_times(folder, tmp_path):
    table = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
    table["arms"] += [{"name": name, "method": name} for name in ("snapkv", "adakv")]
    table["sample"], more = str(folder / "sample.json"), tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump(table | {"ratios": [0.5, 0.25]}), encoding="utf-8")
    again = ["--experiment", str(more), "--texts", str(folder / "texts")]
    run(folder, tmp_path / "alone", *again)
    run(folder, tmp_path / "shared", *again, "--share-prefill")
    alone, shared = ({fidelity.record_key(r): r for r in read_records(tmp_path / n)} for n in ("alone", "shared"))
    for key, record in alone.items():
        for name in ("nll", "kl", "found", "kept_ratio", "rows_max", "stored_bytes", "compactions"):
            assert shared[key].get(name) == record.get(name), (key, name)
        assert (shared[key]["prefill_seconds"] is None) == (key[3] in ("snapkv", "adakv"))
    rows = csv.DictReader((tmp_path / "shared" / "results.csv").read_text(encoding="utf-8").splitlines())
    timed = {row["arm"]: row["prefill_seconds"] for row in rows}
    assert timed["snapkv"] == "nan" and float(timed["window"]) > 0


def test_an_arm_that_stores_too_much_is_left_out_and_named(folder, tmp_path, monkeypatch):
    measure = fidelity.measure

    def leaky(subject, arm, *rest):
        if arm.name == "window":
            raise StoredTooMuchError("window holds everything")
        return measure(subject, arm, *rest)

    monkeypatch.setattr(fidelity, "measure", leaky)
    with pytest.raises(SystemExit, match="window holds everything"):
        run(folder, tmp_path, "--max-rows", "1")
    assert {key[3] for key in values(tmp_path)} == {"none", "full", "merge"}
    assert (tmp_path / "results.md").exists()
    monkeypatch.undo()
    run(folder, tmp_path, "--max-rows", "1")
    assert {key[3] for key in values(tmp_path)} == {"none", "full", "merge", "window"}


def test_an_arm_that_gives_nan_is_left_out_and_named(folder, tmp_path, monkeypatch):
    measure = fidelity.measure

    def broken(subject, arm, *rest):
        return measure(subject, arm, *rest) | ({"nll": float("nan")} if arm.name == "merge" else {})

    monkeypatch.setattr(fidelity, "measure", broken)
    with pytest.raises(SystemExit, match="merge: record .*needle.*found nll=nan"):
        run(folder, tmp_path, "--max-rows", "1", "--tasks", "needle")
    assert {key[3] for key in values(tmp_path)} == {"none", "full", "window"}


def test_a_failing_worker_is_named_after_the_other_arms_are_reported(folder, tmp_path, monkeypatch):
    table = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
    table |= {"name": "pressed", "arms": [ARMS[0], {"name": "kvpress_tova", "press": "TOVAPress"}]}
    (folder / "pressed.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    checked, started = [], []

    def fail(script, argv):
        started.append(argv)
        raise peers.PressError("kvpress's worker failed: no such row")

    monkeypatch.setattr(peers, "check", checked.extend)
    monkeypatch.setattr(peers, "start_worker", fail)
    with pytest.raises(SystemExit, match="model, presses of kvpress: kvpress's worker failed: no such row"):
        run(folder, tmp_path, "--experiment", str(folder / "tiny.yaml"), str(folder / "pressed.yaml"))
    assert [spec.label for spec in checked] == ["TOVAPress"]
    (session,) = {record["session"] for record in read_records(tmp_path)}
    assert started[0][-4:] == ["--out", str(tmp_path), "--session", session], "times of one run compare"
    assert {key[3] for key in values(tmp_path)} == {"none", "full", "window", "merge"}
    assert "# Fidelity: tiny+pressed" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_a_folder_of_one_experiment_takes_the_arms_of_another(folder, finished, tmp_path, monkeypatch):
    for name in ("records-0of1.jsonl", "run-0of1.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    table = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
    table |= {"name": "more", "ratios": [0.25], "arms": [ARMS[0], {"name": "tova", "method": "tova"}]}
    (folder / "more.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    run(folder, tmp_path, "--experiment", str(folder / "tiny.yaml"), str(folder / "more.yaml"))
    found = values(tmp_path)
    assert values(finished).items() <= found.items()
    assert {key[3:] for key in found.keys() - values(finished).keys()} == {("tova", 0.25)}
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| tova | 0.25 |" in text and "| merge | 0.5 |" in text


def test_experiments_that_cannot_be_joined_say_why(folder):
    one = load_experiment(folder / "tiny.yaml")
    other = load_experiment("foundation")
    with pytest.raises(ValueError, match="tiny and foundation cannot be joined: their sample differ"):
        join_experiments([one, other])
    changed = dataclasses.replace(one.arms[1], settings={"method": "h2o"})
    twin = dataclasses.replace(one, name="twin", arms=(one.arms[0], changed))
    with pytest.raises(ValueError, match="twin: arm 'window' has other settings"):
        join_experiments([one, twin])
    renamed = dataclasses.replace(one, arms=(dataclasses.replace(one.arms[0], name="whole"),))
    with pytest.raises(ValueError, match="one name in all experiments"):
        join_experiments([one, renamed])
    assert join_experiments([one]) == one


def test_several_models_make_one_table(folder, tmp_path):
    (folder / "twin").unlink(missing_ok=True)
    (folder / "twin").symlink_to(folder / "model")
    models = ["--model", str(folder / "model"), str(folder / "twin")]
    run(folder, tmp_path, "--max-rows", "1", "--tasks", "needle", "--arms", "window", *models)
    assert values(tmp_path / "model") == values(tmp_path / "twin")
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        table = {(row["model"], row["arm"]): row["nll"] for row in csv.DictReader(file)}
    assert table["model", "window"] == table["twin", "window"] and len(table) == 4
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| model | arm | ratio |" in text and "| twin | window | 0.5 |" in text and "## Conditions: twin" in text
    assert (tmp_path / "model" / "results.md").exists() and not (tmp_path / "run-0of1.json").exists()
    with pytest.raises(ValueError, match="different names"):
        run(folder, tmp_path, "--report-only", "--model", str(folder / "model"), str(folder / "model"))
