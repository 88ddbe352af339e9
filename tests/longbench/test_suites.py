"""SQuAD, GSM8K, LongBench v2, topic retrieval: rows in published formats, published scores, errors with places."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asymkv.longbench import data, models, suites
from asymkv.longbench.suites import gsm8k, longbench_v2, squad, topics
from asymkv.longbench.suites.base import Benchmark, hub_records


def write_lines(path: Path, records: list) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def benchmark(name: str) -> Benchmark:
    found = suites.find(name)
    assert found is not None
    return found


def official(*questions: dict) -> dict:
    """A SQuAD file of one paragraph."""
    return {
        "version": "x",
        "data": [{"title": "t", "paragraphs": [{"context": "The cat sat.", "qas": list(questions)}]}],
    }


ASKED = {
    "id": "q1",
    "question": "Who sat?",
    "answers": [{"text": "The cat", "answer_start": 0}, {"text": "cat", "answer_start": 4}],
}
UNASKED = {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True}


# -- the registry
@pytest.mark.parametrize("name", suites.names())
def test_every_dataset_is_asked_and_scored_by_the_runner(name: str) -> None:
    found, task = benchmark(name), data.load_tasks([name])[name]
    assert task is found.task and task.template.count("{context}") == 1 and task.max_new_tokens > 0
    # The prompt without its context must leave something to compress.
    assert task.template.split("{context}")[0].strip()
    assert sum(name in suite.group or name in suite.apart for suite in suites.SUITES) == 1


def test_settings_of_a_suite_reach_the_datasets_that_have_them() -> None:
    options = {"ruler": {"rows": 3, "hops": 2}, "ruler_vt": {"rows": 4}, "needle": {"depths": 2}}
    suites.check_options(options, ["needle"])
    assert suites.options_for("ruler_vt", options) == {"rows": 4, "hops": 2}
    assert suites.options_for("ruler_cwe", options) == {"rows": 3}
    assert suites.options_for("needle", options) == {"depths": 2} and suites.options_for("qasper", options) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": {}}, "options for 'rule', which has none; known: ruler, "),
        ({"ruler": {"row": 3}}, r"ruler has no options \['row'\]; allowed: lengths, rows"),
        ({"gsm8k": 5}, "options of gsm8k must be an object"),
    ],
)
def test_options_of_nobody_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suites.check_options(options, ["needle"])


def test_without_a_network_the_error_says_what_to_do(monkeypatch) -> None:
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        OSError, match="cannot load rajpurkar/squad .*no route to host; with --data-dir, one of dev-v1.1"
    ):
        data.load_rows("squad")


def test_hub_rows_carry_their_place(monkeypatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: [{"a": 1}])
    assert hub_records("x/y", "main", "test", ["f"]) == [("x/y/main, record 0", {"a": 1})]


# -- SQuAD
def test_squad_reads_official_files_and_hub_rows(tmp_path: Path) -> None:
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(official(ASKED)), encoding="utf-8")
    (row,) = data.load_rows("squad", data_dir=tmp_path)
    assert (row["_id"], row["input"], row["answers"], row["context"]) == (
        "q1",
        "Who sat?",
        ["The cat", "cat"],
        "The cat sat.",
    )
    hub = {"id": "q1", "context": "The cat sat.", "question": "Who sat?", "answers": {"text": ["The cat", "cat"]}}
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "b" / "squad.jsonl", [hub])
    assert data.load_rows("squad", data_dir=tmp_path / "b") == [row]
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(official(ASKED, UNASKED)), encoding="utf-8")
    second = data.load_rows("squad_v2", data_dir=tmp_path)[1]
    assert second["is_impossible"] and second["answers"] == ["unanswerable"] and "unanswerable" in second["note"]


@pytest.mark.parametrize(
    ("said", "exact", "f1"),
    [
        ("the CAT!\nQuestion: next", 1.0, 1.0), ("a black cat", 0.0, 2 / 3), ("", 0.0, 0.0), ("dog", 0.0, 0.0),
        ("unanswerable", 0.0, 0.0), ("The", 0.0, 0.0),
    ],
)  # fmt: skip
def test_squad_scores_are_the_best_over_references(said: str, exact: float, f1: float) -> None:
    record = {"dataset": "squad_v2", "pred": said, "answers": ["The cat", "cat"], "is_impossible": False}
    assert squad.exact_match(record) == exact and squad.f1(record) == pytest.approx(f1)


def test_squad_2_gives_credit_for_saying_that_there_is_no_answer() -> None:
    def record(said: str, *, impossible: bool) -> dict:
        answers = ["unanswerable"] if impossible else ["four"]
        return {"dataset": "squad_v2", "pred": said, "answers": answers, "is_impossible": impossible}

    records = [record("Unanswerable.", impossible=True), record("", impossible=True), record("four", impossible=True),
               record("four cats", impossible=False)]  # fmt: skip
    assert [squad.f1(r) for r in records] == [1.0, 1.0, 0.0, pytest.approx(2 / 3)]
    assert squad.details(records) == {
        "exact_match": 50.0, "answerable f1": 66.67, "answerable exact_match": 0.0, "unanswerable f1": 66.67,
        "unanswerable exact_match": 66.67,
    }  # fmt: skip
    # In 1.1 the word is an answer like any other.
    assert squad.said({"dataset": "squad", "pred": "unanswerable"}) == "unanswerable"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], r"must be SQuAD's object with a field 'data', found list"),
        ({"data": [{"title": "t"}]}, r"dev-v1.1.json, article 0 lacks the field 'paragraphs'; it has title"),
        (
            official({"id": "q", "question": 3, "answers": [{"text": "a"}]}),
            "question 0: field 'question' must be str, found int",
        ),
        (
            official({"id": "q", "question": "?", "answers": "a"}),
            "paragraph 0, question 0: field 'answers' must be list",
        ),
        (official(ASKED, UNASKED), "question 1: field 'answers' is empty; only squad_v2"),
    ],
)
def test_bad_squad_records_are_placed(table: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        data.load_rows("squad", data_dir=tmp_path)


def test_rows_of_suites_are_checked_as_those_of_longbench(tmp_path: Path) -> None:
    hub = {"id": "q1", "context": "c", "question": "?", "answers": {"text": ["a"]}}
    write_lines(tmp_path / "squad.jsonl", [hub, {**hub, "question": "??"}])
    with pytest.raises(ValueError, match="squad, row 1: field '_id' repeats 'q1' of squad, row 0, with another input"):
        data.load_rows("squad", data_dir=tmp_path)
    write_lines(tmp_path / "squad.jsonl", [{**hub, "answers": {"text": ["a", 1]}}])
    with pytest.raises(ValueError, match="squad, row 0: field 'answers' must be a list of strings"):
        data.load_rows("squad", data_dir=tmp_path)
    (tmp_path / "squad.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match="squad has no rows in"):
        data.load_rows("squad", data_dir=tmp_path)
    (tmp_path / "squad.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(ValueError, match="squad.jsonl:1 is not UTF-8"):
        data.load_rows("squad", data_dir=tmp_path)


def test_files_that_are_no_json_or_absent_are_named(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("x", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="has none of dev-v1.1.json, .*it holds: other.txt"):
        data.load_rows("squad", data_dir=tmp_path)
    (tmp_path / "dev-v1.1.json").write_text('{\n"data": [\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"dev-v1.1.json:\d is not JSON"):
        data.load_rows("squad", data_dir=tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n\n{"quest\n', encoding="utf-8")
    with pytest.raises(ValueError, match="gsm8k.jsonl:3 is not JSON"):
        data.load_rows("gsm8k", data_dir=tmp_path)


# -- GSM8K
def test_gsm8k_takes_its_worked_examples_from_either_side(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", [{"question": "How\nmany?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}])
    write_lines(tmp_path / "train.jsonl", [{"question": f"T{i}?", "answer": f"It is\n#### {i},000"} for i in range(3)])
    (own,) = data.load_rows("gsm8k", data_dir=tmp_path)
    assert (
        own["context"].count("Question: ") == 8
        and own["answers"] == ["2 + 2 = 4 #### 4"]
        and own["input"] == "How many?"
    )
    (train,) = data.load_rows("gsm8k", data_dir=tmp_path, options={"shots": 2, "shots_from": "train"})
    assert train["context"] == "Question: T0?\nAnswer: It is #### 0,000\n\nQuestion: T1?\nAnswer: It is #### 1,000\n\n"
    assert train["_id"] != own["_id"]
    with pytest.raises(ValueError, match="shots_from train has 3 worked examples, 4 were asked for"):
        data.load_rows("gsm8k", data_dir=tmp_path, options={"shots": 4, "shots_from": "train"})
    write_lines(tmp_path / "test.jsonl", [{"question": "?", "answer": "four"}])
    with pytest.raises(ValueError, match="test.jsonl:1: field 'answer' must end in '#### number', found 'four'"):
        data.load_rows("gsm8k", data_dir=tmp_path)


def test_own_worked_examples_are_right() -> None:
    for _, solution in gsm8k.OWN_SHOTS:
        steps = [step for step in solution.split(". ") if "=" in step]
        values = [eval(part.replace("x", "*")) for step in steps for part in sums(step)]
        assert values and gsm8k.marked_number(solution) in {str(int(v)) for v in values}
        assert "\n" not in solution


def sums(step: str) -> list[str]:
    """Both sides of each equation of a step."""
    import re

    found = re.findall(r"([\d /x+-]*\d) = (\d+)", step)
    assert all(eval(left.replace("x", "*")) == int(right) for left, right in found)
    return [left for left, _ in found]


@pytest.mark.parametrize(
    ("said", "flexible", "strict"),
    [
        ("so 40 + 2 = 42. #### 1,042\n#### 7", 1.0, 1.0), ("#### $1042.", 1.0, 1.0),
        ("It makes 12, then 1,042.", 1.0, 0.0),
        ("1042 and 3", 0.0, 0.0), ("", 0.0, 0.0), ("#### 1042.0", 0.0, 0.0), ("\n1042\nQuestion: 5", 1.0, 0.0),
    ],
)  # fmt: skip
def test_gsm8k_compares_the_final_number(said: str, flexible: float, strict: float) -> None:
    record = {"pred": said, "answers": ["a = 5 #### 1042"]}
    assert gsm8k.exact_match(record) == flexible and gsm8k.strict_match(record) == strict
    assert gsm8k.details([record]) == {"strict": 100 * strict}


# -- LongBench v2
CHOICES = {f"choice_{letter}": f"{letter}-text" for letter in "ABCD"}
RECORD = {
    "_id": "r1", "domain": "Code", "sub_domain": "Repo", "difficulty": "hard", "length": "medium",
    "question": "What of $C_A$?", **CHOICES, "answer": "C", "context": "Long {text} $Q$",
}  # fmt: skip


def test_longbench_v2_asks_with_its_four_choices(tmp_path: Path, tokenizer, spec) -> None:
    (tmp_path / "data.json").write_text(json.dumps([RECORD]), encoding="utf-8")
    (row,) = data.load_rows("longbench_v2", data_dir=tmp_path)
    assert row["_id"] == "r1" and row["answers"] == ["The correct answer is (C)"]
    asked = row["before"] + row["context"] + row["after"]
    assert "Long {text} $Q$" in asked and "What of $C_A$?" in asked and "(B) B-text" in asked
    (tmp_path / "0shot.txt").write_text("<$DOC$> $Q$ $C_A$|$C_D$\n", encoding="utf-8")
    (other,) = data.load_rows("longbench_v2", data_dir=tmp_path, options={"prompt": str(tmp_path / "0shot.txt")})
    assert other["before"] == "<" and other["after"] == "> What of $C_A$? A-text|D-text" and other["_id"] != "r1"


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("**The correct answer is (B)**", "B"), ("The correct answer is D.", "D"), ("the correct answer is (B)", None),
        ("The correct answer is E; The correct answer is (A)", "A"), ("(B)", None), ("", None),
        ("The correct answer is C, no: The correct answer is (A)", "A"),
    ],
)  # fmt: skip
def test_longbench_v2_finds_the_letter_by_its_own_expressions(said: str, letter: str | None) -> None:
    assert longbench_v2.extract_answer(said) == letter


def test_longbench_v2_scores_by_difficulty_and_length() -> None:
    def record(letter: str, difficulty: str, length: str) -> dict:
        return {"pred": f"The correct answer is {letter}", "answers": ["The correct answer is (A)"],
                "difficulty": difficulty, "length_group": length}  # fmt: skip

    records = [record("A", "easy", "short"), record("B", "hard", "short"), record("A", "hard", "long")]
    assert benchmark("longbench_v2").total(records) == 66.67
    assert longbench_v2.details(records) == {"easy": 100.0, "hard": 50.0, "short": 50.0, "long": 100.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "record 0: field 'answer' must be one of A, B, C, D, found 'E'"),
        ({"difficulty": "mid"}, "field 'difficulty' must be one of easy, hard"),
        ({"length": 7}, "field 'length' must be str, found int: '7'"),
        ({"choice_B": None}, "field 'choice_B' must be str, found NoneType"),
    ],
)
def test_bad_longbench_v2_records_are_placed(change: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{**RECORD, **change}]), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        data.load_rows("longbench_v2", data_dir=tmp_path)


# -- topic retrieval
def test_generated_topics_are_named_in_their_order() -> None:
    rows = data.load_rows("topic_retrieval", options={"topics": 4, "rows": 2, "words": 20, "ask": [1, 3]})
    assert rows == data.load_rows("topic_retrieval", options={"topics": 4, "rows": 2, "words": 20, "ask": [1, 3]})
    assert len(rows) == len({row["_id"] for row in rows}) == 4
    for row, place, ordinal in zip(rows, [0, 2] * 2, ["first", "third"] * 2, strict=True):
        named = [
            part.split(".\n")[0] for part in row["context"].split("USER: I would like to discuss the topic of ")[1:]
        ]
        assert (
            len(set(named)) == 4 and row["answers"] == [named[place]] and f"What is the {ordinal} topic" in row["input"]
        )
    with pytest.raises(ValueError, match="there are 40 topics to talk about, 50"):
        data.load_rows("topic_retrieval", options={"topics": 50})
    with pytest.raises(ValueError, match="ask must be one of 1, 2, 3, found 4"):
        data.load_rows("topic_retrieval", options={"ask": [4]})


def test_published_topics_of_both_formats(tmp_path: Path) -> None:
    prompt = "A record. USER: I would like to discuss the topic of tea. Now the record ends. What is the first topic?"
    write_lines(
        tmp_path / "5_topics.jsonl", [{"test_id": 0, "prompt": prompt, "topics": ["tea", "ice"], "prompt_length": -1}]
    )
    (row,) = data.load_rows("topic_retrieval", data_dir=tmp_path, options={"topics": 5})
    assert row["input"] == "Now the record ends. What is the first topic?" and row["answers"] == ["tea"]
    assert row["context"].endswith("topic of tea.")
    leval = {"input": "talk", "instructions": ["First?", "Second?"], "outputs": ["tea", "ice"]}
    write_lines(tmp_path / "topic_retrieval_longchat.jsonl", [leval])
    rows = data.load_rows("topic_retrieval", data_dir=tmp_path)
    asked = {"topics": 5, "ask": [2]}
    assert data.load_rows("topic_retrieval", data_dir=tmp_path, options=asked) == rows[1:2]
    with pytest.raises(ValueError, match=r"asks for 2 of its topics; ask=\[3\] needs 3"):
        data.load_rows("topic_retrieval", data_dir=tmp_path, options={"topics": 5, "ask": [3]})
    assert [(r["input"], r["answers"]) for r in rows] == [("First?", ["tea"]), ("Second?", ["ice"])]
    write_lines(tmp_path / "topic_retrieval_longchat.jsonl", [{**leval, "outputs": ["tea"]}])
    with pytest.raises(ValueError, match="longchat.jsonl:1: 2 'instructions' for 1 'outputs'"):
        data.load_rows("topic_retrieval", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="has none of topic_retrieval.jsonl"):
        data.load_rows("topic_retrieval", data_dir=tmp_path / "none")
    assert data.load_rows("topic_retrieval", data_dir=tmp_path, options={"generate": True, "rows": 1})


def test_a_topic_counts_wherever_it_is_named() -> None:
    record = {"pred": "The first topic was Keeping  Bees in a CITY.", "answers": ["keeping bees in a city"]}
    assert topics.topic_named(record) == 1.0 and topics.topic_named({**record, "pred": "keeping bees"}) == 0.0


def test_options_of_what_is_not_run_are_refused() -> None:
    suites.check_options({"ruler": {"rows": 3}}, ["needle"], ["ruler_vt", "needle"])
    for options in ({"ruler": {"rows": 3}}, {"ruler_vt": {"rows": 3}}):
        with pytest.raises(ValueError, match=r"options of ruler.*, which is not run; the datasets are needle"):
            suites.check_options(options, ["needle"], ["needle"])


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("ruler_niah_single", {"lengths": [50]}, "of length 50: 128 tokens are kept for the answer alone"),
        ("ruler_cwe", {"lengths": 4096.0}, "lengths must be a list of token counts, found 4096.0"),
        ("topic_retrieval", {"ask": 1}, "ask must be a list of the topics' numbers, found 1"),
        ("topic_retrieval", {"text": 5}, "text must name a file or a folder of .txt files, found 5"),
    ],
)
def test_settings_of_another_kind_are_refused(dataset: str, options: dict, message: str, tokenizer) -> None:
    reader = suites.Reader(models.ModelSpec("tiny", "tiny", 4096, chat_template=False), tokenizer)
    with pytest.raises(ValueError, match=message):
        data.load_rows(dataset, options=options, reader=reader)
