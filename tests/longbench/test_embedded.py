"""Embedded tasks: the same rows on every call, answers that are in the text, sizes that are parameters."""

from __future__ import annotations

import re

import pytest

from asymkv.longbench import data, embedded

SMALL = {
    "needle": {"lengths": [200], "depths": 4},
    "passage_retrieval": {"samples": 3, "passages": 4, "passage_words": 50},
    "code_completion": {"samples": 3, "lines": 40},
}
FIELDS = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}


@pytest.mark.parametrize("dataset", SMALL)
def test_rows_repeat_by_seed_and_have_longbench_fields(dataset: str) -> None:
    rows = data.load_rows(dataset, options=SMALL[dataset])
    assert rows == data.load_rows(dataset, options=SMALL[dataset])
    assert rows != data.load_rows(dataset, options={**SMALL[dataset], "seed": 1})
    assert all(set(row) >= FIELDS and row["dataset"] == dataset for row in rows)
    assert len({row["_id"] for row in rows}) == len(rows) == SMALL[dataset].get("samples", 4)


def test_a_needle_lies_at_its_depth() -> None:
    for row in embedded.needle(lengths=[400], depths=4):
        city = re.fullmatch(r"What is the special access code for (\w+)\?", row["input"]).group(1)
        fact = f"The special access code for {city} is {row['answers'][0]}."
        assert row["context"].count(row["answers"][0]) == 1
        assert row["context"].index(fact) / len(row["context"]) == pytest.approx(row["depth"], abs=0.1)
        assert 400 <= row["length"] < 500
        assert (row["target_len"], row["target_unit"]) == (400, "words")


def test_a_passage_question_comes_from_its_paragraph_only() -> None:
    for row in embedded.passage_retrieval(samples=3, passages=5, passage_words=60):
        paragraphs = row["context"].split("\n\n")
        holders = [text for text in paragraphs if row["input"] in text]
        assert len(paragraphs) == 5 and len(holders) == 1
        assert holders[0].startswith(f"{row['answers'][0]}: ")


def test_a_code_answer_is_the_next_line_of_its_file() -> None:
    library = {path.name: path for path in embedded._library_files()}
    for row in embedded.code_completion(samples=3, lines=30):
        source = library[row["source"]].read_text(encoding="utf-8")
        assert row["context"] + row["answers"][0] + "\n" in source
        assert row["context"].count("\n") == 30


def test_unknown_task_and_unknown_size_are_refused() -> None:
    with pytest.raises(ValueError, match="known: needle"):
        embedded.build_rows("needles")
    with pytest.raises(ValueError, match=r"needle has no options \['sizes'\]; allowed: lengths, depths, samples, seed"):
        embedded.build_rows("needle", sizes=3)
    with pytest.raises(ValueError, match="words left"):
        embedded.needle(lengths=[10**6], depths=1)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("needle", {"lengths": 600}, "needle: lengths must be a list of word counts; found 600"),
        ("needle", {"lengths": []}, "needle: lengths must be a list of word counts"),
        ("needle", {"lengths": [0]}, "needle: lengths must be an integer >= 1; found 0"),
        ("needle", {"samples": 0}, "needle: samples must be an integer >= 1; found 0"),
        ("needle", {"depths": 0}, "needle: depths must be an integer >= 1; found 0"),
        ("passage_retrieval", {"passages": 0}, "passage_retrieval: passages must be an integer >= 1"),
        ("code_completion", {"lines": -3}, "code_completion: lines must be an integer >= 1; found -3"),
    ],
)
def test_sizes_that_make_no_rows_are_refused(dataset: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load_rows(dataset, options=options)
