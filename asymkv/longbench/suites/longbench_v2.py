"""LongBench v2: 503 questions with four choices over contexts of 8k to 2M words (arXiv 2412.15204).

Rows come from the published file (``data.json``) or the hub. The answer is found by LongBench v2's two expressions,
asterisks removed: ``The correct answer is (X)``, else ``The correct answer is X``; a prediction with neither is
wrong. Accuracy overall, and by difficulty and length. Contexts above the model's limit are cut in the middle, and
the question is asked in a chat turn, as there. The prompt is this package's own and asks for that form of answer;
option ``prompt`` takes a file of LongBench v2's ``prompts/`` folder instead (with ``$DOC$``, ``$Q$`` and ``$C_A$``
to ``$C_D$``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from asymkv.longbench.data import Row, Task
from asymkv.longbench.jsonl import shown
from asymkv.longbench.suites.base import (
    Benchmark,
    Source,
    Suite,
    find_file,
    get,
    hub_records,
    percent,
    read_records,
    row,
)
from asymkv.texts import read_text

HUB = "THUDM/LongBench-v2"
FILES = ("longbench_v2.jsonl", "longbench_v2.json", "data.json")
LETTERS = ("A", "B", "C", "D")
LEVELS = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}
# A row's length is in words everywhere; the published group stands beside it.
GROUPS = {"difficulty": LEVELS["difficulty"], "length_group": LEVELS["length"]}
ANSWER = "The correct answer is"
_PATTERNS = (re.compile(ANSWER + r" \(([A-D])\)"), re.compile(ANSWER + r" ([A-D])"))
MAX_NEW_TOKENS = 128
PROMPT = (
    "Here is a text, followed by a question about it.\n\n$DOC$\n\nQuestion: $Q$\n\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n"
    f'(D) $C_D$\n\nOne of the four choices is right. Answer in this form: "{ANSWER} (letter)".'
)


def load(source: Source, *, prompt: str | None = None) -> list[Row]:
    """The rows; ``prompt`` names a prompt file of LongBench v2.

    Raises:
        ValueError: for a record without a field or with an unknown answer, difficulty or length, or a prompt without
            one ``$DOC$``.
    """
    text = PROMPT if prompt is None else read_text(prompt).strip()
    if text.count("$DOC$") != 1:
        raise ValueError(f"prompt {prompt} must contain $DOC$ exactly once")
    if source.data_dir is None:
        found = hub_records(HUB, None, "train", FILES)
    else:
        found = read_records(find_file(source.data_dir, FILES))
    return [_row(where, record, text, own=prompt is None) for where, record in found]


def _row(where: str, record: Row, prompt: str, *, own: bool) -> Row:
    letter = _one_of(record, "answer", where, LETTERS)
    levels = {name: _one_of(record, name, where, allowed) for name, allowed in LEVELS.items()}
    question = get(record, "question", where)
    blanks = {"$Q$": question, **{f"$C_{name}$": get(record, f"choice_{name}", where) for name in LETTERS}}
    # One pass, so that a question that spells another blank stays as it is.
    before, after = (
        re.sub(r"\$(?:Q|C_[A-D])\$", lambda blank: blanks[blank.group()], part) for part in prompt.split("$DOC$")
    )
    extra = {name: get(record, name, where) for name in ("domain", "sub_domain")}
    extra |= {"before": before, "after": after, "difficulty": levels["difficulty"]}
    extra |= {"length_group": levels["length"]}
    made = row("longbench_v2", get(record, "context", where), question, [f"{ANSWER} ({letter})"], **extra)
    return {**made, "_id": get(record, "_id", where)} if own else made


def _one_of(record: Row, name: str, where: str, allowed: Sequence[str]) -> str:
    value = get(record, name, where)
    if value not in allowed:
        raise ValueError(f"{where}: field {name!r} must be one of {', '.join(allowed)}, found {value!r}")
    return value


def extract_answer(text: str) -> str | None:
    """The letter that an answer gives, by LongBench v2's own rules; None where it gives none."""
    plain = text.replace("*", "")
    found = next((match for pattern in _PATTERNS if (match := pattern.search(plain))), None)
    return found and found.group(1)


def _reference(record: Row) -> str | None:
    """The right letter: from a whole answer, as this package's rows have it, or by itself."""
    answer = record["answers"][0]
    return answer if answer in LETTERS else extract_answer(answer)


def refuse(record: Row) -> str | None:
    """Why a record cannot be scored."""
    if _reference(record) is None:
        return f"field 'answers' must give one of the letters {', '.join(LETTERS)}, found {shown(record['answers'][0])}"
    return None


def accuracy(record: Row) -> float:
    """1 if the prediction gives the right letter."""
    return float(extract_answer(record["pred"]) == _reference(record))


def details(records: Sequence[Row]) -> dict[str, float]:
    """Accuracy by difficulty and by length, of those that occur."""
    groups = {
        level: [accuracy(record) for record in records if record[name] == level]
        for name, levels in GROUPS.items()
        for level in levels
    }
    return {level: percent(scores) for level, scores in groups.items() if scores}


TASK = Task("longbench_v2", "{before}{context}{after}", MAX_NEW_TOKENS, record_fields=(*GROUPS, "domain", "sub_domain"))
SUITE = Suite("longbench_v2", (Benchmark(TASK, load, accuracy, details, tuple(GROUPS), refuse),))
