"""ROUGE-L as the ``rouge`` package computes it, to its last digit, without its tables.

That package fills a dictionary of (words + 1) x (words + 1) lengths for every pair of sentences. Here a row of the
table is one integer (bit-parallel longest common subsequence, Hyyro 2004): bit j of row i is 0 where the length grows
between column j and j + 1, so that a length is a count of zeros: 10,000 summaries take 20 seconds, not 20 minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# The package walks the table with one Python call a step. LongBench's scorer has 9 frames on the stack by then and a
# limit of 1,000, and scores what overflows as 0: a walk of more steps than this.
MAX_STEPS = 990


def summary_f1(prediction: str, truth: str) -> float:
    """F1 of the summary-level ROUGE-L of two texts.

    Sentences end at full stops. The words of the longest common subsequences of all pairs of sentences are united as a
    set, over all pairs, and counted against the sets of the two texts' words. 0 for a text without sentences (empty, or
    full stops alone), and where the package overflows the stack on a long sentence.
    """
    said, wanted = _sentences(prediction), _sentences(truth)
    if not said or not wanted:
        return 0.0
    said_words = [(sentence, frozenset(sentence)) for sentence in said]
    union: set[str] = set()
    for reference in wanted:
        known = frozenset(reference)
        for sentence, words in said_words:
            if len(reference) + len(sentence) > MAX_STEPS and _steps(reference, sentence) > MAX_STEPS:
                return 0.0
            # What is united already can add nothing; a word that only the sentence has is stepped over.
            if not union.issuperset(known & words):
                shared = [word for word in sentence if word in known]
                union.update(reference[i] for i, _ in _walk(reference, shared) if i is not None)
    recall = len(union) / len({word for sentence in wanted for word in sentence})
    precision = len(union) / len({word for sentence in said for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Different sentences as lists of words; white space alone is a sentence of one empty word, as in the package."""
    parts = dict.fromkeys(" ".join(part.split()) for part in text.split(".") if part)
    return [part.split(" ") for part in parts]


def _rows(x: Sequence[str], y: Sequence[str]) -> list[int]:
    """Bit rows of the table of ``x`` against ``y``; row i is of the first i words of ``x``."""
    where: dict[str, int] = {}
    for j, word in enumerate(y):
        where[word] = where.get(word, 0) | (1 << j)
    full = (1 << len(y)) - 1
    row, rows = full, [full]
    for word in x:
        hits = row & where.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
        rows.append(row)
    return rows


def lcs_length(x: Sequence[str], y: Sequence[str]) -> int:
    """Length of the longest common subsequence of two lists of words."""
    return len(y) - _rows(x, y)[-1].bit_count()


def _walk(x: Sequence[str], y: Sequence[str]) -> Iterator[tuple[int | None, int]]:
    """The package's way back through the table: (index in ``x`` of a common word, or None for a step aside; column)."""
    rows = _rows(x, y)
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            yield i, j
            continue
        above = j - (rows[i - 1] & ((1 << j) - 1)).bit_count()
        left = j - 1 - (rows[i] & ((1 << (j - 1)) - 1)).bit_count()
        i, j = (i - 1, j) if above > left else (i, j - 1)
        yield None, j


def _steps(x: Sequence[str], y: Sequence[str]) -> int:
    return sum(1 for _ in _walk(x, y))
