"""kvpress itself, in its own environment: the same rows, one table, resumed, and its mistakes named.

Needs the overlay (make kvpress). Without it the tests are skipped, unless ASYMKV_REQUIRE_KVPRESS is set.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from byte_tokenizers import byte_tokenizer
from filelock import FileLock
from tiny_models import tiny_model

from asymkv.longbench import fidelity, peers, sample
from asymkv.longbench.press_arms import PressError, PressSpec
from asymkv.longbench.records import RecordFolder
from asymkv.paths import config_path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SNAPKV = {"press": "SnapKVPress", "window_size": 16}
OURS = ("snapkv", "tova", "expected_attention")
PRESSES = {
    "snapkv": SNAPKV,
    "tova": {"press": "TOVAPress"},
    "expected_attention": {"press": "ExpectedAttentionPress"},
    "observed": {"press": "ObservedAttentionPress"},
    "pyramidkv": {"press": "PyramidKVPress", "window_size": 16},
    "adakv": {"press": "AdaKVPress", "base": SNAPKV},
    "kvzip": {"press": "KVzipPress"},
}

pytestmark = pytest.mark.skipif(
    not (peers.overlay_path() / "kvpress").is_dir() and not os.environ.get("ASYMKV_REQUIRE_KVPRESS"),
    reason="kvpress's environment is not installed (make kvpress)",
)


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, two rows, a text, and an experiment of our settings beside the presses that they copy.

    The processes of pytest-xdist share one folder: kvpress takes many seconds to import.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "peers"
    with FileLock(f"{root}.lock"):
        if not root.exists():
            fill(root)
    return root


def fill(root):
    root.mkdir()
    tokenizer = byte_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [
        {"_id": f"row{i}", "context": " ".join(f"{(7 * j + i) % 89}:{j}" for j in range(40)), "input": "What is 3?",
         "answers": [f"answer {i}"], "length": 40}
        for i in range(2)
    ]  # fmt: skip
    (root / "qasper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "dataset2prompt.json").write_text(json.dumps({"qasper": "Read: {context}\n{input}"}), encoding="utf-8")
    (root / "dataset2maxlen.json").write_text(json.dumps({"qasper": 8}), encoding="utf-8")
    ids = {"qasper": [row["_id"] for row in rows]}
    table = {"max_prompt_tokens": 700, "sha256": sample.sample_sha256(ids), "tasks": ids}
    (root / "sample.json").write_text(json.dumps(table), encoding="utf-8")
    (root / "texts").mkdir()
    (root / "texts" / "story.txt").write_text(" ".join(str(j * j) for j in range(60)), encoding="utf-8")
    base = {"sample": "sample.json", "ratios": [1.0, 0.5],
            "texts": {"prefix_tokens": 120, "target_tokens": 20, "windows": 1}}  # fmt: skip
    full = {"name": "full", "method": "full"}
    ours = [{"name": name, **settings_of(name)} for name in OURS]
    theirs = [{"name": f"kvpress_{name}", **press} for name, press in PRESSES.items()]
    write(root / "ours.yaml", {**base, "name": "ours", "arms": [full, *ours]})
    write(root / "theirs.yaml", {**base, "name": "theirs", "arms": [full, *theirs]})


def settings_of(name):
    settings = yaml.safe_load(config_path(f"methods/kvpress_{name}.yaml").read_text(encoding="utf-8"))
    return {**settings, "window_size": 16} if name == "snapkv" else settings


def write(path, table):
    path.write_text(yaml.safe_dump(table), encoding="utf-8")


def run(folder, out, *extra):
    base = ["--experiment", str(folder / "ours.yaml"), str(folder / "theirs.yaml"), "--data-dir", str(folder)]
    base += ["--model", str(folder / "model"), "--max-length", "900", "--no-chat-template", "--dtype", "float32"]
    base += ["--longbench-config", str(folder), "--texts", str(folder / "texts"), "--out", str(out)]
    load_script("fidelity").main([*base, "--changed-prompts", *extra])


def read(out, kind="row"):
    records = RecordFolder(out, fidelity.record_key).read()
    return {(r["arm"], r["ratio"], r["id"]): r for r in records if r["kind"] == kind}


@pytest.fixture(scope="module")
def finished(folder):
    """A run of some arms on one row, whose presses' records are kept beside it, and the whole run after it."""
    out = folder / "out"
    with FileLock(f"{out}.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "check", lambda specs: None)
        if not (out / "whole").exists():
            run(folder, out, "--max-rows", "1", "--arms", "snapkv", "kvpress_tova")
            (out / "earlier").write_bytes((out / "records-kvpress-0of1.jsonl").read_bytes())
            run(folder, out)
            (out / "whole").touch()
    return out


def test_a_later_run_measures_what_is_missing(finished):
    earlier = (finished / "earlier").read_bytes()
    assert {json.loads(line)["arm"] for line in earlier.splitlines()} == {"kvpress_tova"}
    assert (finished / "records-kvpress-0of1.jsonl").read_bytes().startswith(earlier)
    rows = read(finished)
    cells = 2 * (len(OURS) + len(PRESSES)) + 2  # with full and none
    assert len(rows) == 2 * cells and len(read(finished, "window")) == cells - 1
    lines = (finished / "records-kvpress-0of1.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 * len(PRESSES) * 3
    assert {json.loads(line)["arm"] for line in lines} == {f"kvpress_{name}" for name in PRESSES}


def test_presses_that_share_a_prefill_give_the_same_numbers(folder, finished, tmp_path):
    """KVzip that keeps everything replays nothing and is alone; peaks are those of a prefill each."""
    run(folder, tmp_path, "--share-prefill", "--arms", *(f"kvpress_{name}" for name in PRESSES))
    for kind in ("row", "window"):
        both = [read(out, kind).items() for out in (finished, tmp_path)]
        alone, shared = ({key: record for key, record in each if "kvpress" in key[0]} for each in both)
        assert shared.keys() == alone.keys() and len(shared) == 2 * len(PRESSES) * (2 if kind == "row" else 1)
        for key, record in alone.items():
            assert (shared[key]["prefill_seconds"] is None) == (key[:2] != ("kvpress_kvzip", 1.0)), key
            for name in record.keys() - {"prefill_seconds", "session"}:
                assert shared[key][name] == record[name], (key, name)


def test_a_finished_run_starts_no_worker(folder, finished, monkeypatch):
    monkeypatch.setattr(peers, "check", None)
    monkeypatch.setattr(peers, "start_worker", None)
    run(folder, finished)


def test_a_press_loses_what_our_setting_of_it_loses(finished):
    for kind, names in (("row", ("nll",)), ("window", ("nll", "kl"))):
        records = read(finished, kind)
        for (arm, ratio, item), ours in records.items():
            if arm in OURS and ratio == 0.5:
                theirs = records[f"kvpress_{arm}", ratio, item]
                assert theirs["kept_ratio"] == pytest.approx(ours["kept_ratio"], abs=1e-6)
                assert theirs["stored_bytes"] < ours["stored_bytes"] < ours["full_bytes"]
                for name in names:
                    assert theirs[name] == pytest.approx(ours[name], abs=2e-4), (arm, item, name)


def test_a_press_that_keeps_all_is_the_full_cache(finished):
    for kind in ("row", "window"):
        records = read(finished, kind)
        for (arm, ratio, item), record in records.items():
            if arm.startswith("kvpress_") and ratio == 1.0:
                assert record["nll"] == pytest.approx(records["full", None, item]["nll"], abs=1e-4), arm


def test_presses_that_mask_are_charged_for_all_rows(finished):
    for (arm, ratio, _), record in read(finished).items():
        if arm in ("kvpress_adakv", "kvpress_kvzip") and ratio == 0.5:
            assert record["stored_bytes"] == record["full_bytes"] and record["kept_ratio"] == 1.0
            assert record["nominal_ratio"] == pytest.approx(0.5, abs=0.01)
    table = (finished / "results.md").read_text(encoding="utf-8")
    header = next(line for line in table.splitlines() if line.startswith("| arm"))
    column = header.split("|").index(" share in view ")
    lines = [line.split("|") for line in table.splitlines() if line.startswith("| kvpress_") and "| 0.5 |" in line]
    shares = {line[1].strip(): line[column].strip() for line in lines if len(line) == len(header.split("|"))}
    assert set(shares) == {f"kvpress_{name}" for name in PRESSES}
    assert 49 < float(shares["kvpress_kvzip"].rstrip(" %")) <= 50


def test_the_record_says_what_ran_where(finished):
    runs = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in finished.glob("run-*.json")}
    own, theirs = runs["run-0of1.json"], runs["run-kvpress-0of1.json"]
    assert not any(name.startswith("kvpress_") for name in own["settings"]["arms"])
    assert theirs["settings"]["arms"]["kvpress_adakv"] == PRESSES["adakv"] and "full" not in theirs["settings"]["arms"]
    session = theirs["sessions"][-1]
    assert session["peer"]["kvpress"] == "0.5.5" and session["versions"]["transformers"] == "5.2.0"
    assert session["full_cache"]["found"] == pytest.approx(session["full_cache"]["expected"], abs=1e-5)
    assert own["sessions"][-1]["versions"]["transformers"] != "5.2.0"


WRONG = [
    ({"press": "SnapPress"}, "no press 'SnapPress'; available: AdaKVPress, .*TOVAPress"),
    ({"press": "SnapKVPress", "window": 3}, r"no arguments \['window'\]; it has \['kernel_size', 'window_size'\]"),
    ({"press": "AdaKVPress"}, r"wraps a press: base: \{press: SnapKVPress\}, or AdaKVPress\(SnapKVPress\)"),
    ({"press": "TOVAPress", "base": {"press": "KnormPress"}}, "TOVAPress wraps no other press"),
    ({"press": "AdaKVPress", "base": {"press": "KVzipPress"}}, "AdaKVPress.KVzipPress.*requires a ScorerPress"),
    ({"press": "DecodingPress"}, "DecodingPress cannot be an arm: it works on generated tokens"),
]


def test_wrong_presses_are_named_before_anything_is_measured():
    with pytest.raises(PressError) as error:
        peers.check([PressSpec.from_mapping(table) for table in (*PRESSES.values(), *(t for t, _ in WRONG))])
    lines = str(error.value).splitlines()
    assert len(lines) == len(WRONG)
    for line, (_, message) in zip(lines, WRONG, strict=True):
        assert re.search(message, line), line


def test_pred_measures_presses_in_the_same_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "check", lambda specs: None)
    arguments = ["--model", str(folder / "model"), "--max-length", "900", "--dtype", "float32", "--device", "cpu"]
    arguments += ["--no-chat-template", "--data-dir", str(folder), "--longbench-config", str(folder)]
    arguments += ["--changed-prompts"]
    arguments += ["--methods", "full,none,kvpress_tova,kvpress:TOVAPress,kvpress:AdaKVPress(SnapKVPress)"]
    arguments += ["--set", "kvpress_AdaKVPress_SnapKVPress.alpha_safeguard=0.5", "--ratio", "0.5"]
    load_script("pred").main([*arguments, "--protocol", "prompt", "--out", str(tmp_path)])
    ours, theirs, masked = (
        [json.loads(line) for line in (tmp_path / name / "qasper.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("kvpress_tova", "kvpress_TOVAPress", "kvpress_AdaKVPress_SnapKVPress")
    )
    assert [r["pred"] for r in ours] == [r["pred"] for r in theirs]
    assert [r["nll"] for r in ours] == pytest.approx([r["nll"] for r in theirs], abs=2e-4)
    assert all(r["nominal_ratio"] < 0.51 and r["stored_bytes"] == r["full_bytes"] for r in masked)
    report = json.loads((tmp_path / "kvpress_AdaKVPress_SnapKVPress" / "run.json").read_text(encoding="utf-8"))
    assert report["settings"]["config.alpha_safeguard"] == 0.5 and report["conditions"]["peer"]["kvpress"] == "0.5.5"
    assert report["conditions"]["full_cache"]["found"] == pytest.approx(report["conditions"]["full_cache"]["expected"])
