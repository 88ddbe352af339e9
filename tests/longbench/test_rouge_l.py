"""ROUGE-L by bit rows: the values of the ``rouge`` package, its overflow included, and of ``rouge_score``'s."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable

import pytest

from asymkv.longbench import metrics, rouge_l, scoring_speed

# Few words make ambiguous paths through the table; full stops, repeated ones and white space make odd sentences.
ALPHABETS = {
    "letters": ["a", "b", "c", "."],
    "odd": ["a", "b", "the", "the.", ".", "..", " . ", "\n", "A", "x.y", "\u5317"],
    "many": [*(f"w{i}" for i in range(40)), ".", "."],
}


def package_score(prediction: str, truth: str) -> float:
    """What LongBench's ``rouge_score`` returns."""
    from rouge import Rouge

    try:
        return Rouge().get_scores([prediction], [truth], avg=True)["rouge-l"]["f"]
    except Exception:
        return 0.0


def draw(words: list[str]) -> str:
    return " ".join(random.choice(words) for _ in range(random.randint(0, 50)))


@pytest.mark.parametrize("name", ALPHABETS)
def test_values_are_those_of_the_rouge_package(name: str) -> None:
    pytest.importorskip("rouge")
    random.seed(7)
    pairs = [(draw(ALPHABETS[name]), draw(ALPHABETS[name])) for _ in range(150)]
    wanted = [package_score(*pair) for pair in pairs]
    assert [rouge_l.summary_f1(*pair) for pair in pairs] == pytest.approx(wanted, abs=1e-12)
    assert sum(score > 0 for score in wanted) > 100


def test_values_of_long_texts_are_those_of_both_packages() -> None:
    pytest.importorskip("rouge")
    pytest.importorskip("rouge_score")
    for row in scoring_speed.compare_with_packages(2):
        assert row["largest_difference"] < 1e-12 and row["mean_score"] > 0.1


def at_longbenchs_depth(work: Callable[[], float]) -> float:
    """Runs ``work`` with as many frames left as LongBench's scorer has: module, scorer, metric, limit 1,000."""
    found = []

    def run() -> None:
        depth, frame = 0, sys._getframe()
        while frame:
            depth, frame = depth + 1, frame.f_back
        before = sys.getrecursionlimit()
        # `work` and what it calls stand where the metric stands in LongBench: third.
        sys.setrecursionlimit(1000 + depth - 1)
        try:
            found.append(work())
        finally:
            sys.setrecursionlimit(before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("words", [989, 990, 991])
@pytest.mark.parametrize("long", ["prediction", "truth"])
def test_a_sentence_overflows_where_the_package_overflows_in_longbench(long: str, words: int) -> None:
    """The walk starts at both ends and the common word is first: a step for each word of the long text."""
    pytest.importorskip("rouge")
    text = " ".join(f"w{i}" for i in range(words))
    pair = (text, "w0") if long == "prediction" else ("w0", text)
    wanted = at_longbenchs_depth(lambda: package_score(*pair))
    assert rouge_l.summary_f1(*pair) == pytest.approx(wanted, abs=1e-12)
    assert (wanted == 0) == (words > rouge_l.MAX_STEPS)


def test_the_longest_common_subsequence_is_as_long_as_the_tables() -> None:
    random.seed(3)
    for _ in range(50):
        x, y = ([random.choice("abcd") for _ in range(random.randint(0, 30))] for _ in range(2))
        rows = [[0] * (len(y) + 1)]
        for word in x:
            last = rows[-1]
            row = [0]
            for j, other in enumerate(y):
                row.append(last[j] + 1 if word == other else max(last[j + 1], row[j]))
            rows.append(row)
        assert rouge_l.lcs_length(x, y) == rows[-1][-1]


def test_code_similarity_is_fuzzywuzzys_in_its_difflib_form(monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    import difflib

    # Whichever matcher fuzzywuzzy found at import, LongBench's numbers are difflib's.
    monkeypatch.setattr(fuzz, "SequenceMatcher", difflib.SequenceMatcher)
    random.seed(5)
    for size in (3, 40, 260):  # from 200 characters on, difflib leaves out frequent ones
        for _ in range(20):
            said, gold = ("".join(random.choice("ab(_)= ,x") for _ in range(size)) for _ in range(2))
            assert metrics.code_sim_score(said, gold) == pytest.approx(fuzz.ratio(said, gold) / 100, abs=1e-9)
