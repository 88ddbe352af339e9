"""RULER's question answering: the paragraph that answers a SQuAD question, hidden among other paragraphs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from asymkv.longbench.data import Row, Task
from asymkv.longbench.suites import squad
from asymkv.longbench.suites.base import Benchmark, Reader, Source, row
from asymkv.longbench.suites.ruler_common import LENGTHS, ROWS, largest, rows_by_length, string_match_part

TEMPLATE = (
    "Below are some documents. Answer the question that follows them with a few words of one of them and nothing else."
    "\n\n{context}\n\nQuestion: {input}"
)
ANSWER_PREFIX = "Answer:"
MAX_NEW_TOKENS = 32


def _row(task: Task, rows: Sequence[Row], reader: Reader, rng: random.Random, limit: int, index: int) -> Row:
    asked = rng.choice(rows)
    others = list(dict.fromkeys(entry["context"] for entry in rows if entry["context"] != asked["context"]))
    rng.shuffle(others)
    # Every paragraph has more than 8 tokens; tokenising all of SQuAD for each row would be slow.
    others, place = others[: limit // 8 + 1], rng.random()

    def make(used: int) -> Row:
        documents = others[:used]
        documents.insert(int(place * (used + 1)), asked["context"])
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, start=1))
        return row(task.dataset, context, asked["input"], asked["answers"], question_id=asked["_id"])

    sizes = reader.sizes([f"Document 100:\n{text}\n\n" for text in others])
    return largest(task, reader, limit, sizes, make)


def question_answering(
    source: Source, *, lengths: Sequence[int] = LENGTHS, rows: int = ROWS, seed: int = 0
) -> list[Row]:
    """Questions of SQuAD 1.1 (``--data-dir``, else the hub), each paragraph a document; filled up with whole ones."""
    found = squad.load("squad", source)
    return rows_by_length(TASK, source, lengths, rows, seed, partial(_row, TASK, found))


TASK = Task(
    "ruler_qa", TEMPLATE, MAX_NEW_TOKENS, answer_prefix=ANSWER_PREFIX, record_fields=("target_len", "question_id")
)
BENCHMARKS = (Benchmark(TASK, question_answering, string_match_part),)
