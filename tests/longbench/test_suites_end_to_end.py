"""scripts/pred.py and scripts/eval.py over generated rows and rows of several questions, on a tiny random model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SCBENCH = {
    "context": " ".join(f"k{i}: v{i};" for i in range(80)),
    "multi_turns": [{"input": f"Key k{i}?", "answer": f"v{i}"} for i in (3, 70)],
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path):
    """Runs pred and eval with these arguments and returns the scores."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    pred, scoring = importlib.import_module("pred"), importlib.import_module("eval")

    def start(*arguments: str, out: str = "run") -> dict:
        settings = ["--model", str(tiny_folder), "--max-length", "1500", "--dtype", "float32", "--device", "cpu"]
        settings += ["--methods", "full,none,streaming_llm", "--ratio", "0.4", "--set", "window_size=8"]
        pred.main([*settings, "--max-new-tokens", "4", "--out", str(tmp_path / out), *arguments])
        return scoring.main([str(tmp_path / out)])

    return start


def test_ruler_runs_from_generation_to_the_table(run, tmp_path: Path) -> None:
    options = {"ruler": {"lengths": [1400], "rows": 1}, "ruler_cwe": {"words": 2}}
    arguments = ["--datasets", "ruler", "--options", json.dumps(options)]
    scores = run(*arguments)
    assert len(scores["full"]["scores"]) == 7 and all(value >= 0 for value in scores["full"]["scores"].values())
    record = json.loads((tmp_path / "run" / "full" / "ruler_niah_multikey.jsonl").read_text(encoding="utf-8"))
    assert record["depth"] == 0.05 and record["target_len"] == 1400 and record["removed_tokens"] == 0
    assert "| ruler_niah_single | ruler_niah_multikey |" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.ruler_cwe"):
        run("--datasets", "ruler", "--options", json.dumps({**options, "ruler_cwe": {"words": 2, "seed": 1}}))


@pytest.mark.parametrize("mode", ["shared", "multi_turn"])
def test_scbench_runs_in_both_modes(mode: str, run, tmp_path: Path) -> None:
    (tmp_path / "scbench_kv.jsonl").write_text((json.dumps(SCBENCH) + "\n") * 2, encoding="utf-8")
    arguments = ["--data-dir", str(tmp_path), "--options", json.dumps({"scbench": {"mode": mode}})]
    scores = run("--datasets", "scbench_kv", "--protocol", "context", *arguments)
    for arm in ("full", "none", "streaming_llm"):
        assert set(scores[arm]["details"]["scbench_kv"]) == {"turn 1", "turn 2"}
        records = (tmp_path / "run" / arm / "scbench_kv.jsonl").read_text(encoding="utf-8").splitlines()
        assert [len(json.loads(record)["pred"]) for record in records] == [2, 2]
    assert scores["full"]["retention"]["rows"] == 2
    assert "| method | turn 1 | turn 2 |" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.scbench_kv"):
        run("--datasets", "scbench_kv", "--protocol", "context", "--data-dir", str(tmp_path),
            "--options", json.dumps({"scbench": {"mode": mode, "turns": 1}}))  # fmt: skip


def write_published_files(folder: Path) -> None:
    asked = {"id": "q", "question": "Who?", "answers": [{"text": "Ann"}]}
    unasked = {"id": "r", "question": "Why?", "answers": [], "is_impossible": True}
    for name, questions in (("dev-v1.1.json", [asked]), ("dev-v2.0.json", [asked, unasked])):
        table = {"data": [{"paragraphs": [{"context": "Ann sat.", "qas": questions}]}]}
        (folder / name).write_text(json.dumps(table), encoding="utf-8")
    (folder / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "It is #### 2"}\n', encoding="utf-8")
    choices = {f"choice_{letter}": letter for letter in "ABCD"}
    record = {"_id": "a", "domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short", "question": "?",
              **choices, "answer": "A", "context": "long " * 500}  # fmt: skip
    (folder / "data.json").write_text(json.dumps([record]), encoding="utf-8")
    talk = {"input": "talk", "instructions": ["First?"], "outputs": ["tea"]}
    (folder / "topic_retrieval.jsonl").write_text(json.dumps(talk) + "\n", encoding="utf-8")


def test_published_files_run_to_their_details(run, tmp_path: Path) -> None:
    write_published_files(tmp_path)
    names = "squad,squad_v2,gsm8k,longbench_v2,topic_retrieval"
    scores = run("--datasets", names, "--data-dir", str(tmp_path), "--methods", "full", "--protocol", "context")["full"]
    assert scores["rows"] == {"squad": 1, "squad_v2": 2, "gsm8k": 1, "longbench_v2": 1, "topic_retrieval": 1}
    assert set(scores["details"]["squad_v2"]) == {
        "exact_match", "answerable f1", "answerable exact_match", "unanswerable f1", "unanswerable exact_match",
    }  # fmt: skip
    assert set(scores["details"]["longbench_v2"]) == {"easy", "short"} and "strict" in scores["details"]["gsm8k"]
    cut = json.loads((tmp_path / "run" / "full" / "longbench_v2.jsonl").read_text(encoding="utf-8"))
    assert cut["removed_tokens"] > 1000 and (cut["domain"], cut["length"]) == ("d", "short")


def test_bad_options_stop_before_anything_runs(run, capsys) -> None:
    with pytest.raises(SystemExit):
        run("--options", "{ruler: 1}")
    assert "argument --options: not JSON" in capsys.readouterr().err
    with pytest.raises(ValueError, match="options for 'rulr'"):
        run("--datasets", "ruler_vt", "--options", '{"rulr": {}}')
