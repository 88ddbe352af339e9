"""Small long-context tasks built from text that every Python installation carries, in LongBench's row format.

``needle`` plants one fact in prose at a chosen depth, ``passage_retrieval`` asks which paragraph a sentence comes
from, ``code_completion`` asks for the next line of a standard-library file. The prose is the language reference in
``pydoc_data.topics``. Rows are the same on every call with the same arguments and the same Python version; the
sha256 of their ids, which every run records, says whether two runs saw the same ones.
"""

from __future__ import annotations

import inspect
import itertools
import random
import re
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from asymkv.checks import check_integer
from asymkv.longbench.files import sha256

Row = dict[str, Any]

CITIES = (
    "Madrid", "Toronto", "Nairobi", "Chicago", "Oakland", "Kyoto", "Lisbon", "Helsinki", "Santiago", "Auckland",
    "Warsaw", "Montreal", "Havana", "Dublin", "Seville", "Boston",
)  # fmt: skip
MIN_PARAGRAPH_WORDS = 30
# Longer ones are lists without full stops.
MAX_SENTENCE_WORDS = 60
# Prose has few symbols; tables, grammars and code have many.
MAX_SYMBOL_SHARE = 0.06
MIN_TARGET_CHARS, MAX_TARGET_CHARS = 16, 90
MIN_FILE_LINES = 120
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def build_rows(dataset: str, **options: Any) -> list[Row]:
    """Builds an embedded task.

    Args:
        dataset: ``needle``, ``passage_retrieval`` or ``code_completion``.
        options: sizes and seed, as the function of that name takes them.

    Raises:
        ValueError: for an unknown task or option, or a size that is not a whole number above 0; lists what is allowed.
    """
    builders = {"needle": needle, "passage_retrieval": passage_retrieval, "code_completion": code_completion}
    if dataset not in builders:
        raise ValueError(f"unknown embedded task {dataset!r}; known: {', '.join(builders)}")
    allowed = list(inspect.signature(builders[dataset]).parameters)
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(f"{dataset} has no options {unknown}; allowed: {', '.join(allowed)}")
    for name, value in options.items():
        _check_option(f"{dataset}: {name}", name, value)
    return builders[dataset](**options)


def _check_option(label: str, name: str, value: Any) -> None:
    if name == "lengths":
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(f"{label} must be a list of word counts; found {value!r}")
        for words in value:
            check_integer(label, words, 1)
    elif name != "seed" and not (name == "samples" and value is None):
        check_integer(label, value, 1)


def needle(
    *, lengths: Sequence[int] = (600, 1200, 2400), depths: int = 10, samples: int | None = None, seed: int = 0
) -> list[Row]:
    """One planted access code per row, at every depth of every length, in shuffled order.

    Args:
        lengths: context lengths in words (a word of this prose is about 1.5 tokens).
        depths: how many depths, evenly spaced from the beginning to the end.
        samples: keep the first so many rows; shuffling makes them a mix of depths and lengths.
        seed: of text order, cities, codes and row order.
    """
    rng = random.Random(f"needle-{seed}")
    rows = []
    for words in lengths:
        for index in range(depths):
            depth = (index + 0.5) / depths
            rows.append(_needle_row(rng, words, depth))
    rng.shuffle(rows)
    return rows[:samples]


def _needle_row(rng: random.Random, words: int, depth: float) -> Row:
    city, code = rng.choice(CITIES), str(rng.randrange(10_000, 100_000))
    taken = _take_words(sentences(rng), words)
    starts = [0, *itertools.accumulate(len(sentence.split()) for sentence in taken)]
    place = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * starts[-1]))
    taken.insert(place, f"The special access code for {city} is {code}.")
    question = f"What is the special access code for {city}?"
    row = _row("needle", question, " ".join(taken), [code])
    return {**row, "depth": depth, "target_len": words, "target_unit": "words"}


def passage_retrieval(*, samples: int = 30, passages: int = 12, passage_words: int = 120, seed: int = 0) -> list[Row]:
    """Which of the numbered paragraphs does a sentence come from.

    Args:
        samples: number of rows.
        passages: paragraphs a row.
        passage_words: length of a paragraph in words.
        seed: of texts, order and questions.
    """
    rng = random.Random(f"passage_retrieval-{seed}")
    return [_passage_row(rng, passages, passage_words) for _ in range(samples)]


def _passage_row(rng: random.Random, passages: int, words: int) -> Row:
    stream = sentences(rng)
    texts = []
    for _ in range(passages):
        taken = _take_words(stream, words)
        # The next paragraph starts where this one ended, so that no sentence occurs in two of them.
        stream = stream[len(taken) :]
        texts.append(taken)
    target = rng.randrange(passages)
    question = max(texts[target], key=len)
    context = "\n\n".join(f"Paragraph {number}: {' '.join(text)}" for number, text in enumerate(texts, start=1))
    return _row("passage_retrieval", question, context, [f"Paragraph {target + 1}"])


def code_completion(*, samples: int = 30, lines: int = 150, seed: int = 0) -> list[Row]:
    """The next line of a file of the standard library.

    Args:
        samples: number of rows, from as many files where there are so many.
        lines: lines of code in view before the one asked for.
        seed: of files and places.
    """
    rng = random.Random(f"code_completion-{seed}")
    files = _library_files()
    rng.shuffle(files)
    rows: list[Row] = []
    for attempt in range(20 * samples):
        if len(rows) == samples:
            return rows
        row = _code_row(rng, files[attempt % len(files)], lines)
        if row is not None and all(row["_id"] != other["_id"] for other in rows):
            rows.append(row)
    return rows


def _code_row(rng: random.Random, path: Path, lines: int) -> Row | None:
    """A row from a random place of one file, or None where the place holds no telling line."""
    source = path.read_text(encoding="utf-8").splitlines()
    if len(source) < MIN_FILE_LINES:
        return None
    places = [number for number in range(len(source) // 2, len(source)) if _is_telling(source, number)]
    if not places:
        return None
    number = rng.choice(places)
    context = "\n".join(source[max(0, number - lines) : number]) + "\n"
    return {**_row("code_completion", "", context, [source[number]]), "source": path.name}


def _is_telling(source: list[str], number: int) -> bool:
    """A line of code (not prose of a docstring), long enough to be more than syntax."""
    line = source[number].strip()
    looks_like_code = re.match(r"(return |if |for |raise |self\.|\w+ = |\w+\.\w+\()", line) is not None
    return looks_like_code and MIN_TARGET_CHARS <= len(line) <= MAX_TARGET_CHARS and "#" not in line and "`" not in line


def _library_files() -> list[Path]:
    """Source files of the standard library's top-level modules, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [root / f"{name}.py" for name in sorted(sys.stdlib_module_names) if not name.startswith("_")]
    found = [path for path in paths if path.is_file() and _decodes(path)]
    if not found:
        raise FileNotFoundError(f"no standard-library sources under {root}; pass a data folder instead")
    return found


def _decodes(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


@cache
def _paragraphs() -> tuple[str, ...]:
    """The language reference's paragraphs of prose, on one line each, without duplicates, in a fixed order."""
    from pydoc_data.topics import topics

    blocks = (block for name in sorted(topics) for block in re.split(r"\n\s*\n", topics[name]))
    return tuple(dict.fromkeys(" ".join(block.split()) for block in blocks if _is_prose(block)))


def _is_prose(block: str) -> bool:
    symbols = sum(1 for char in block if not (char.isalnum() or char.isspace() or char in ".,;:'\"()-"))
    return len(block.split()) >= MIN_PARAGRAPH_WORDS and symbols <= MAX_SYMBOL_SHARE * len(block)


def sentences(rng: random.Random) -> list[str]:
    """All sentences of the prose; paragraphs in random order, sentences in theirs."""
    paragraphs = list(_paragraphs())
    rng.shuffle(paragraphs)
    found = (sentence for text in paragraphs for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text))
    return list(dict.fromkeys(sentence for sentence in found if len(sentence.split()) <= MAX_SENTENCE_WORDS))


def _take_words(sentences: list[str], words: int) -> list[str]:
    """The first sentences that make up so many words, all of them whole."""
    taken, total = [], 0
    for sentence in sentences:
        if total >= words:
            return taken
        taken.append(sentence)
        total += len(sentence.split())
    if total < words:
        raise ValueError(f"the embedded prose has {total} words left, {words} were asked for")
    return taken


def _row(dataset: str, question: str, context: str, answers: list[str]) -> Row:
    return {
        "input": question,
        "context": context,
        "answers": answers,
        "length": len(context.split()) + len(question.split()),
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": sha256("\n".join([dataset, question, context, *answers]).encode("utf-8"))[:48],
        "source": f"Python {PYTHON}",
    }
