"""Rows and prompts from folders, from the hub's archive, and from LongBench's config."""

from __future__ import annotations

import io
import json
import urllib.request
import zipfile
from pathlib import Path

import pytest

from asymkv.longbench import data

ROW = {"input": "q", "context": "c", "answers": ["a"], "_id": "r"}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_repeated_ids_become_unique_and_absent_ones_are_made(tmp_path: Path) -> None:
    nameless = {key: value for key, value in ROW.items() if key != "_id"}
    write_rows(tmp_path / "qasper.jsonl", [ROW, ROW, nameless])
    ids = [row["_id"] for row in data.load_rows("qasper", data_dir=tmp_path)]
    assert ids[:2] == ["r", "r#2"] and len(set(ids)) == 3


def test_rows_can_be_chosen_by_id(tmp_path: Path) -> None:
    write_rows(tmp_path / "qasper.jsonl", [{**ROW, "_id": name} for name in "abc"])
    assert [row["_id"] for row in data.load_rows("qasper", data_dir=tmp_path, row_ids=["c", "a"])] == ["c", "a"]
    with pytest.raises(ValueError, match="has no rows"):
        data.load_rows("qasper", data_dir=tmp_path, row_ids=["d"])


def test_rows_of_a_file_take_no_options(tmp_path: Path) -> None:
    write_rows(tmp_path / "needle.jsonl", [ROW])
    with pytest.raises(ValueError, match="needle is read from .* and takes no options, found depths"):
        data.load_rows("needle", data_dir=tmp_path, options={"depths": 3})


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "trec.jsonl").write_text('{"input": "q"}\n', encoding="utf-8")
    (tmp_path / "lcc.jsonl").write_text('{"input"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="lacks context, answers"):
        data.load_rows("trec", data_dir=tmp_path)
    with pytest.raises(ValueError, match="lcc.jsonl:1 is not JSON"):
        data.load_rows("lcc", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="the folder holds: lcc, trec"):
        data.load_rows("qasper", data_dir=tmp_path)


def test_hub_rows_come_from_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("data/qasper_e.jsonl", json.dumps({**ROW, "length": 9}) + "\n")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: str(archive))
    assert data.load_rows("qasper_e") == [{**ROW, "length": 9}]
    with pytest.raises(ValueError, match="unknown dataset 'quasper'"):
        data.load_rows("quasper")


def test_longbench_prompts_come_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "dataset2prompt.json").write_text('{"qasper": "{context} {input}"}', encoding="utf-8")
    (tmp_path / "dataset2maxlen.json").write_text('{"qasper": 9}', encoding="utf-8")
    tasks = data.load_tasks(["qasper_e", "needle"], tmp_path, changed_prompts=True)
    assert tasks["qasper_e"] == data.Task("qasper_e", "{context} {input}", 9)
    assert "{context}" in tasks["needle"].template
    with pytest.raises(ValueError, match="unknown task 'trec': no prompt for it; known: .*qasper"):
        data.load_tasks(["trec"], tmp_path, changed_prompts=True)


def test_fetched_prompts_are_checked_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path))
    content = {"dataset2prompt.json": b'{"qasper": "{context}"}', "dataset2maxlen.json": b'{"qasper": 3}'}
    calls = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        calls.append(url)
        return io.BytesIO(content[url.rsplit("/", 1)[-1]])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match="another sha256"):
        data.load_tasks(["qasper"])
    assert not list(tmp_path.rglob("*.json"))
    monkeypatch.setattr(data, "CONFIG_SHA256", {n: data.files.sha256(c) for n, c in content.items()})
    calls.clear()
    for _ in range(2):
        assert data.load_tasks(["qasper"])["qasper"].max_new_tokens == 3
    assert len(calls) == 2  # one per file
