"""``scripts/fidelity.py`` end to end on a tiny random model: resume, shards, refusal, and reports."""

import csv
import dataclasses
import json

import pytest
import yaml
from longbench_files import load_script, other_process

from asymkv.longbench import fidelity, fidelity_report, needle_plot, peers, sample
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
    assert [spec.label for spec in checked] == ["TOVAPress"] and started[0][-1] == str(tmp_path)
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


def fixture_record(task, item, arm, ratio, nll, nbytes):
    return {
        "kind": "row", "dataset": task, "id": item, "arm": arm, "ratio": ratio, "nll": nll, "tokens_seen": 100,
        "kept_ratio": ratio or 1.0, "rows_max": 100 * (ratio or 1.0), "stored_bytes": nbytes, "full_bytes": 1000,
        "peak_rows": 100, "peak_bytes": nbytes + 100 * (item == "r1"), "prefill_seconds": 0.5,
    }  # fmt: skip


def fixture_results(folder):
    losses = {"none": (4.0, 3.0), "full": (2.0, 1.0), "window": (3.0, 2.5), "merge": (2.5, 1.5)}
    nbytes = {"none": 10, "full": 1000, "window": 500, "merge": 550}
    records = [
        fixture_record("trec", f"r{i}", arm, 0.5 if arm in ("window", "merge") else None, nll, nbytes[arm])
        for arm, pair in losses.items()
        for i, nll in enumerate(pair)
    ]
    return fidelity_report.Results(records, load_experiment(folder / "tiny.yaml"))


def test_report_from_fixture_records(folder):
    results = fixture_results(folder)
    summary = {row["arm"]: row for row in fidelity_report.summarise(results)}
    # merge: (1.5 + 1.5) / (2 + 2); window: (1 + 0.5) / 4
    assert summary["full"]["retention"] == 1.0
    assert summary["merge"]["retention"] == pytest.approx(0.75)
    assert summary["window"]["retention"] == pytest.approx(0.375)
    assert summary["merge"]["share_of_stock_bytes"] == pytest.approx(0.55)
    assert summary["merge"]["peak_share_of_stock_bytes"] == pytest.approx(0.60)
    assert summary["merge"]["rows_per_head"] == pytest.approx(50)
    (difference,) = fidelity_report.paired(results)
    assert difference["difference"] == pytest.approx(0.375)
    assert difference["bytes_over_reference"] == pytest.approx(1.1)
    assert summary["merge"]["prefill_over_full"] == 1.0
    results.one_machine = False
    assert "nan" in str(fidelity_report.summarise(results)[0]["prefill_over_full"]), "times of two machines"
    table = fidelity_report.main_table(fidelity_report.summarise(results))
    assert "| merge | 0.5 | 0.750 [0.750, 0.750] | 2 | 0.00 | 55.0 % | 60.0 % | 50.0 |" in table


def test_rows_out_of_view_have_a_column_where_there_are_any(folder):
    results = fixture_results(folder)
    assert "share in view" not in fidelity_report.main_table(fidelity_report.summarise(results))
    for record in results.of("row", ("merge", 0.5)).values():
        record |= {"kept_ratio": 1.0, "nominal_ratio": 0.25, "rows_max": 100}
    summary = fidelity_report.summarise(results)
    table = fidelity_report.main_table(summary)
    assert "| rows per head | share in view |" in table
    assert "| merge | 0.5 | 0.750 [0.750, 0.750] | 2 | 0.00 | 55.0 % | 60.0 % | 100.0 | 25.0 % |" in table
    assert "| 50.0 % | 55.0 % | 50.0 | 50.0 % |" in table
    assert "what attention" in fidelity_report.definitions(summary, [])
    for protocol in ("prompt", "context"):
        text = fidelity_report.definitions(summary, [{"settings": {"protocol": protocol}}])
        assert ("first token of an answer comes from the prefill" in text) == (protocol == "prompt")


def test_figure_is_drawn_where_there_is_something_to_draw(folder, tmp_path):
    summary = fidelity_report.summarise(fixture_results(folder))
    assert fidelity_report.plot(summary, tmp_path / "retention.png")
    assert (tmp_path / "retention.png").read_bytes().startswith(b"\x89PNG")
    undefined = [{**row, "retention": float("nan")} for row in summary]
    assert not fidelity_report.plot(undefined, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def needle_records(dataset, found):
    """Two depths at two lengths; the compressed arm finds what ``found`` says."""
    cells = [(depth, length) for depth in (0.1, 0.9) for length in (1000, 2000)]
    for arm, ratio in (("none", None), ("full", None), ("window", 0.5)):
        for i, (depth, length) in enumerate(cells):
            record = fixture_record(dataset, f"n{i}", arm, ratio, 4.0 if arm == "none" else 1.0, 10)
            seconds = {"full": 2.0, "window": (2.0, 3.0, 4.0, 40.0)[i]}.get(arm, 0.1)
            right = {"none": False, "full": True}.get(arm, found[i])
            yield record | {"depth": depth, "target_len": length, "found": right, "prefill_seconds": seconds}


def test_needles_of_each_dataset_have_their_own_heat_map(folder, tmp_path):
    records = [*needle_records("needle", [True] * 4), *needle_records("needle_multikey", [True, False, False, False])]
    results = fidelity_report.Results(records, load_experiment(folder / "tiny.yaml"))
    grids = fidelity_report.needle_grids(results)
    assert list(grids) == ["needle", "needle_multikey"] and list(grids["needle"]) == [("full", None), ("window", 0.5)]
    assert grids["needle"]["window", 0.5] == {1000: {0.1: (1, 1), 0.9: (1, 1)}, 2000: {0.1: (1, 1), 0.9: (1, 1)}}
    assert grids["needle_multikey"]["window", 0.5] == {
        1000: {0.1: (1, 1), 0.9: (0, 1)},
        2000: {0.1: (0, 1), 0.9: (0, 1)},
    }
    assert "| needle_multikey | window | 0.5 | 2000 tokens | 0/1 | 0/1 |" in fidelity_report.needle_table(results)
    both, one = tmp_path / "both.png", tmp_path / "one.png"
    assert needle_plot.plot(grids, both) and needle_plot.plot({"needle": grids["needle"]}, one)
    heights = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (both, one)]
    assert heights[0] == 2 * heights[1]  # a block of panels a dataset
    assert not needle_plot.plot({"needle": {("full", None): {}}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_time_of_compression_is_the_median_multiple_of_the_full_caches_prefill(folder):
    records = list(needle_records("needle", [True] * 4))
    results = fidelity_report.Results(records, load_experiment(folder / "tiny.yaml"))
    summary = {row["arm"]: row for row in fidelity_report.summarise(results)}
    assert summary["full"]["prefill_over_full"] == 1.0
    assert summary["window"]["prefill_over_full"] == 1.75  # of 1, 1.5, 2, 20
    header, _, _, row = fidelity_report.main_table(list(summary.values())).splitlines()
    assert header.endswith("| x full's prefill |") and row.endswith("| 1.75 |")


def test_an_unfinished_arm_is_marked(folder):
    results = fixture_results(folder)
    del results._by_kind["row"]["merge", 0.5]["trec", "r1"]
    summary = {row["arm"]: row for row in fidelity_report.summarise(results)}
    assert not summary["merge"]["complete"]
    assert "1 (unfinished)" in fidelity_report.main_table(list(summary.values()))
    # Over the first row alone: (4 - 3) / (4 - 2) and (4 - 2.5) / (4 - 2).
    page = fidelity_report.markdown(results, [])
    assert "1 rows." in page and "| window | 0.500 |" in page and "| merge | 0.750 |" in page
