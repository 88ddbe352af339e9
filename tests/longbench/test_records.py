"""Record folders, shipped experiments, and how the standing sample is chosen."""

import json

import pytest

from asymkv.longbench import fidelity, fidelity_experiment, sample
from asymkv.longbench.records import RecordFolder, Shard, machines
from asymkv.paths import config_root


def test_arms_may_be_added_but_not_changed(tmp_path):
    folder = RecordFolder(tmp_path, fidelity.record_key)
    folder.claim({"protocol": "context", "texts": None, "arms": {"a": {"window_size": 8}}}, {"date": "1"})
    folder.claim({"protocol": "context", "texts": {"t": "0"}, "arms": {"b": {"window_size": 9}}}, {"date": "2"})
    with pytest.raises(ValueError, match="arms.a"):
        folder.claim({"arms": {"a": {"window_size": 9}}}, {"date": "3"})


def test_a_setting_that_a_later_version_leaves_open_is_no_other_setting(tmp_path):
    old = {"arms": {"merge": {"method": "asymkv", "chunk_size": None}}}
    folder = RecordFolder(tmp_path, tuple)
    folder.claim(old, {})
    folder.claim({"arms": {"merge": {"method": "asymkv", "dimensions": None}}}, {})
    with pytest.raises(ValueError, match="arms.merge differ"):
        folder.claim({"arms": {"merge": {"method": "asymkv", "chunk_size": 64}}}, {})


def test_a_forgotten_arm_may_be_measured_with_other_files(tmp_path):
    """The others stay as they are, byte by byte; while somebody writes, nothing is taken."""
    cell = {"kind": "row", "dataset": "trec", "id": "é", "ratio": 0.5}
    settings = {"dtype": "float32", "arms": {"gate": {}, "echo": {}}, "files.gate": {"gate": "old"}}
    for index in range(2):
        folder = RecordFolder(tmp_path, fidelity.record_key, Shard(index, 2))
        folder.claim(settings, {"date": "1"})
        for arm in ("gate", "echo", "none"):
            folder.append({**cell, "arm": arm, "id": f"é{index}"})
    with pytest.raises(ValueError, match="being written by another process"):
        folder.forget(["gate"])
    for index in range(2):
        RecordFolder(tmp_path, fidelity.record_key, Shard(index, 2)).release()
    with pytest.raises(ValueError, match="holds nothing of snapkv; it has echo, gate, none"):
        folder.forget(["gate", "snapkv"])
    assert len(folder.read()) == 6
    others = [line for line in folder.records_path.read_bytes().splitlines() if b'"gate"' not in line]
    whole = folder.run_path.read_bytes()
    assert folder.forget(["gate"]) == 2
    folder.run_path.write_bytes(whole)
    assert folder.forget(["gate"]) == 0, "goes on where it was killed"
    assert folder.records_path.read_bytes().splitlines() == others and len(folder.read()) == 4
    assert all(run["settings"] == {"dtype": "float32", "arms": {"echo": {}}} for run in folder.runs())
    folder.claim({**settings, "files.gate": {"gate": "new"}}, {"date": "2"})
    assert folder.runs()[1]["settings"]["files.gate"] == {"gate": "new"}


def test_a_folder_knows_the_machines_that_it_was_measured_on():
    runs = [{"sessions": [{"device_name": name}, {}]} for name in ("a", "b", "a")]
    assert machines(runs) == {"a", "b"} and not machines([{"sessions": [{}]}])


def test_what_is_damaged_in_a_folder_is_placed(tmp_path):
    folder = RecordFolder(tmp_path, fidelity.record_key)
    folder.claim({}, {})
    folder.records_path.write_text('{"kind": "row"}\n')
    with pytest.raises(ValueError, match=r"records-0of1.jsonl:1: a record lacks dataset; it has kind"):
        folder.read()
    folder.run_path.write_text("{")
    with pytest.raises(ValueError, match=r"run-0of1.json:1 is not JSON"):
        folder.claim({}, {})


@pytest.mark.parametrize("wrapped", [dict, lambda arm: [arm, 128, None]], ids=["settings", "identity"])
def test_an_option_that_an_older_folder_does_not_know_was_at_its_default(tmp_path, wrapped):
    folder = RecordFolder(tmp_path, tuple)
    folder.claim({"arms": {"merge": wrapped({"method": "echo", "action": "merge"})}}, {})
    folder.claim({"arms": {"merge": wrapped({"method": "echo", "action": "merge", "merged_position": "last"})}}, {})
    with pytest.raises(ValueError, match="arms.merge differ"):
        folder.claim({"arms": {"merge": wrapped({"method": "echo", "action": "merge", "level": "head"})}}, {})
    other = RecordFolder(tmp_path / "other", tuple)
    other.claim({"arms": {"merge": wrapped({"method": "echo", "action": "merge"})}}, {})
    with pytest.raises(ValueError, match="arms.merge differ"):
        other.claim({"arms": {"merge": wrapped({"method": "echo", "action": "merge", "merged_position": "mean"})}}, {})


def test_an_option_that_is_left_open_is_not_at_its_default(tmp_path):
    folder = RecordFolder(tmp_path, tuple)
    folder.claim({"arms": {"all": {"method": "asymkv", "max_queries": None}}}, {})
    with pytest.raises(ValueError, match="arms.all differ"):
        folder.claim({"arms": {"all": {"method": "asymkv", "max_queries": 128}}}, {})


def test_flat_settings_know_their_methods_defaults_too(tmp_path):
    folder = RecordFolder(tmp_path, tuple)
    folder.claim({"config.method": "echo", "config.action": "merge"}, {})
    folder.claim({"config.method": "echo", "config.action": "merge", "config.merged_weights": "cardinality"}, {})
    older = RecordFolder(tmp_path / "older", tuple)
    older.claim({"config.method": "echo", "config.action": "merge"}, {})
    with pytest.raises(ValueError, match="config.merged_weights differ"):
        older.claim({"config.method": "echo", "config.action": "merge", "config.merged_weights": "loss"}, {})


@pytest.mark.parametrize(("old", "name"), [
    ({"arms": {"gate": {}}}, "files.gate"), ({"config.ratio": 0.5}, "config.files")])  # fmt: skip
def test_records_of_unknown_files_are_not_ascribed_to_todays(tmp_path, old, name):
    folder = RecordFolder(tmp_path, tuple)
    folder.claim(old, {})
    folder.claim({**old, name: {"gate": "new"}, "files.other": {"gate": "new"}}, {})
    found = folder.runs()[0]["settings"]
    assert found[name] is None and found["files.other"] == {"gate": "new"}
    with pytest.raises(ValueError, match="files.other differ"):
        folder.claim({**old, "files.other": {"gate": "newer"}}, {})


@pytest.mark.parametrize("text", ["2/2", "1", "a/b", "-1/2"])
def test_bad_shards_raise(text):
    with pytest.raises(ValueError, match="shard"):
        Shard.parse(text)


# The tasks of each half that have contexts of 5,000 tokens and more.
LONG_TASKS = {
    "quality_long": ["needle", "qasper", "qmsum", "gov_report", "passage_retrieval_en"],
    "quality_long_tune": ["needle", "qmsum", "gov_report", "lcc", "passage_retrieval_en"],
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_root() / "experiments").glob("*.yaml")))
def test_the_shipped_experiments_and_their_sample_are_sound(name):
    experiment = fidelity_experiment.load_experiment(name)
    cells = {(cell.name, cell.ratio) for cell in experiment.cells()}
    assert len(cells) == 1 + len(experiment.ratios) * (len(experiment.arms) - 1)
    chosen = sample.read_sample(experiment.sample)
    assert list(chosen.tasks) == LONG_TASKS.get(name, list(sample.STANDING_TASKS))
    assert len({len(ids) for ids in chosen.tasks.values()}) == 1, "as many rows of every task"


def test_standing_sample_spreads_depth_and_takes_one_row_per_context(tmp_path):
    def row(name, context, answer, **extra):
        return {"_id": name, "context": context, "input": "q", "answers": [answer], **extra}

    depths, lengths = (0.1, 0.5, 0.9), (10, 20, 900)
    rows = [row(f"{d}-{n}", "x" * n + str(d), "a", depth=d) for d in depths for n in lengths]
    twins = [row(f"t{i}", "same" * (i // 2 + 1), "a" * i) for i in range(1, 7)]
    for task, table in {"needle": rows, "qa": twins}.items():
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    chosen = sample.select_standing_sample(
        tmp_path, len, tasks=("needle", "qa"), rows_per_task=3, max_prompt_tokens=100
    )["tasks"]
    assert chosen["needle"] == ["0.1-10", "0.5-20", "0.9-10"]
    assert chosen["qa"] == ["t1", "t5", "t6"]
    longer = {"tasks": ("needle",), "max_prompt_tokens": 1000, "min_prompt_tokens": 21}
    chosen = sample.select_standing_sample(tmp_path, len, rows_per_task=3, **longer)["tasks"]
    assert chosen["needle"] == ["0.1-20", "0.5-900", "0.9-20"], "a context is its x and the three of its depth"
    with pytest.raises(ValueError, match="needle has 3 different contexts of at least 500 tokens, 4 rows are wanted"):
        sample.select_standing_sample(tmp_path, len, rows_per_task=4, **{**longer, "min_prompt_tokens": 500})


def test_halves_share_no_context_and_reported_ones_are_never_tuned_on(tmp_path):
    rows = [{"_id": f"{i}-{q}", "context": f"text {i}", "input": q, "answers": ["a" * (1 + len(q))]}
            for i in range(40) for q in ("", "why")]  # fmt: skip
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def contexts(half, reported=()):
        picked = {"tasks": ("qa",), "rows_per_task": 5, "half": half, "reported": reported}
        ids = sample.select_standing_sample(tmp_path, len, **picked)["tasks"]["qa"]
        return {row["context"] for row in rows if row["_id"] in ids}

    tune, report = contexts("tune"), contexts("report")
    assert len(tune) == len(report) == 5
    assert {sample.half_of(c) for c in tune} == {"tune"} and {sample.half_of(c) for c in report} == {"report"}
    reported = [row["_id"] for row in rows if row["context"] in tune and not row["input"]]
    assert not contexts("tune", reported) & tune, "whatever question of a context is reported"


def test_shared_text_is_found_whatever_context_it_stands_in():
    first, second = "".join(map(chr, range(200, 800))), "".join(map(chr, range(2000, 2600)))
    runs = sample.text_runs([first])
    assert sample.shared_text(second, runs) == 0 and sample.shared_text(first[50:400], runs) == 1
    assert 0.4 < sample.shared_text(second[:300] + first[:300], runs) < 0.5
    assert sample.shared_text("short", runs) == 0


def test_the_shipped_samples_are_of_different_halves():
    folder = fidelity_experiment.load_experiment("quality").sample.parent
    tune, standing = (sample.read_sample(folder / f"{name}_sample.json") for name in ("tune", "standing"))
    assert fidelity_experiment.load_experiment("quality_tune").sample.name == "tune_sample.json"
    for task, ids in tune.tasks.items():
        assert (len(ids), len(standing.tasks[task])) == (3, sample.ROWS_PER_TASK)
        assert not set(ids) & set(standing.tasks[task])
