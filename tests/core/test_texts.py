"""Names of data sets: every script takes every form, and says which it does not."""

import importlib
import json
from pathlib import Path

import pytest

from asymkv.distill.text import read_dataset
from asymkv.experiments.corpus import read_articles, read_text
from asymkv.texts import documents, read_files, split_name
from asymkv.texts import read_text as read_file

WIKITEXT = "Salesforce/wikitext"


@pytest.mark.parametrize(("name", "found"), [
    ("roneneldan/TinyStories", ("roneneldan/TinyStories", None)),
    ("Salesforce/wikitext:wikitext-2-v1", (WIKITEXT, "wikitext-2-v1")),
    ("Salesforce/wikitext/wikitext-2-v1", (WIKITEXT, "wikitext-2-v1")),
    ("wikitext:wikitext-2-v1", (WIKITEXT, "wikitext-2-v1")),
    ("wikitext/wikitext-103-raw-v1", (WIKITEXT, "wikitext-103-raw-v1")),
    ("wikitext-103-v1", (WIKITEXT, "wikitext-103-v1")),
    ("cnn_dailymail", ("abisee/cnn_dailymail", "3.0.0")),
    ("cnn_dailymail/1.0.0", ("abisee/cnn_dailymail", "1.0.0")),
    ("ptb", ("ptb", None)),
])  # fmt: skip
def test_names_of_data_sets(name, found):
    assert split_name(name) == found


def test_a_configuration_may_be_given_apart_but_not_twice():
    assert split_name("wikitext", "wikitext-2-v1") == split_name("wikitext:wikitext-2-v1", "wikitext-2-v1")
    with pytest.raises(ValueError, match="names configuration 'a'; found 'b' beside it"):
        split_name("owner/name:a", "b")
    for name in ("a/b/c/d", ":x", ""):
        with pytest.raises(ValueError, match="a data set is named owner/name, .*; found"):
            split_name(name)


@pytest.fixture
def asked(monkeypatch):
    """What the library is asked for; its rows are always the same two."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(path, configuration, *, split, cache_dir):
        calls.append((path, configuration, split))
        return datasets.Dataset.from_dict({"text": ["one ", "two"], "summary": ["1", "2"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", ["roneneldan/TinyStories", "wikitext/wikitext-2-v1", "owner/name:part"])
def test_training_and_experiments_read_the_same_data_set(asked, name):
    assert "".join(read_dataset(name, "test")) == read_text(name) == "one two"
    assert asked[0] == asked[1] == (*split_name(name), "test")
    assert [article.text for article in read_articles(name, 2)] == ["one ", "two"]
    assert asked[2] == (*split_name(name), "test[:2]")


def test_local_documents_in_lines_are_taken_apart(tmp_path):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("two", "three")))
    assert read_text(str(tmp_path / "b.jsonl")) == "two\n\nthree"
    (tmp_path / "a.txt").write_text("one")
    assert read_text(str(tmp_path)) == "one\n\ntwo\n\nthree"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .txt or .jsonl files in"):
        read_text(str(tmp_path / "empty"))


@pytest.mark.parametrize("script", ["evaluate", "run_experiments"])
def test_scripts_take_the_configuration_apart(script, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    module = importlib.import_module(script)
    args = module.parse_args(["--dataset_name", "wikitext", "--dataset_config", "wikitext-2-v1"])
    assert module.options_of(args).text_config == "wikitext-2-v1"


def test_a_text_that_is_missing_or_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        read_file(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match=r"no text file at .*none\.txt"):
        read_file(tmp_path / "none.txt")


def test_lines_of_wikitext_make_articles():
    lines = ["", " = One = \n", "", " text , with = signs = \n", " = = Part = = \n", " = Two = \n", " end \n"]
    found = list(documents(lines, "wikitext-103-v1"))
    assert found == ["", "".join(lines[1:5]), "".join(lines[5:])]
    assert "".join(found) == "".join(lines)
    assert list(documents(lines, "owner/name")) == lines


def test_lines_of_a_jsonl_file_end_at_line_feeds_only(tmp_path):
    """Other line ends are text, blank lines are none, and what is wrong is named with file and line."""
    texts = ["one\u2028two\u0085three", "four\x0cfive"]
    rows = [json.dumps({"text": text, "summary": "s"}, ensure_ascii=False) for text in texts]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(["", rows[0], "", rows[1], ""]), encoding="utf-8")
    assert list(read_files([file])) == texts
    assert [a.text for a in read_articles(str(file), 2)] == texts and len(read_articles(str(file), 1)) == 1
    file.write_text(rows[0] + "\n{", encoding="utf-8")
    for read in (lambda: list(read_files([file])), lambda: read_articles(str(file), 2)):
        with pytest.raises(ValueError, match=r"a\.jsonl:2 is not JSON"):
            read()
    file.write_text('{"words": 1}', encoding="utf-8")
    with pytest.raises(ValueError, match=r'a\.jsonl:1: expected an object with "text"'):
        list(read_files([file]))
