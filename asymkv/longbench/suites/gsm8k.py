"""GSM8K: word problems answered by a few-shot chain of thought (arXiv 2110.14168).

The worked examples are the context, so that they are what is compressed; they are this package's own, or the first
``shots`` problems of the train split (``train.jsonl`` in ``--data-dir``, else the hub's). Never asked in a chat
turn: the answer continues the pattern, on one line. The prediction's number is the one after ``####``, else its
last; it must be the solution's as text, commas, a currency sign and a final full stop removed. ``strict`` counts
only numbers after ``####``.
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
    choice,
    count,
    find_file,
    get,
    hub_records,
    percent,
    read_records,
    row,
)

HUB, CONFIG = "openai/gsm8k", "main"
FILES, TRAIN_FILES = ("gsm8k.jsonl", "test.jsonl"), ("train.jsonl", "gsm8k_train.jsonl")
TEMPLATE = "Solve each problem step by step and end with #### and the result.\n\n{context}Question: {input}\nAnswer:"
MAX_NEW_TOKENS = 256
_MARKED = re.compile(r"####\s*(-?\$?[0-9][0-9.,]*)")
_NUMBER = re.compile(r"-?\$?[0-9][0-9.,]*")
_CALCULATION = re.compile(r"<<[^>]*>>")
OWN_SHOTS = (
    (
        "A ferry carries 24 cars on each trip and makes 6 trips a day. On Sunday it makes half as many trips. How many "
        "cars does it carry on Sunday?",
        "On Sunday it makes 6 / 2 = 3 trips. It carries 24 x 3 = 72 cars. #### 72",
    ),
    (
        "Nora bakes 5 trays of 12 rolls. She keeps 8 rolls and packs the others into bags of 4. How many bags does she "
        "fill?",
        "She bakes 5 x 12 = 60 rolls. She packs 60 - 8 = 52 rolls. That fills 52 / 4 = 13 bags. #### 13",
    ),
    (
        "A shelf holds 18 novels and a third as many atlases. Omar takes 5 books away. How many books are left?",
        "There are 18 / 3 = 6 atlases, so the shelf holds 18 + 6 = 24 books. Then 24 - 5 = 19 are left. #### 19",
    ),
    (
        "Tickets cost $15 for adults and $9 for children. Two adults and three children pay with a $100 note. How much "
        "change do they get?",
        "The adults pay 2 x 15 = 30 dollars and the children 3 x 9 = 27 dollars, together 57 dollars. They get "
        "100 - 57 = 43 dollars back. #### 43",
    ),
    (
        "A pump fills 40 litres a minute into a tank that loses 10 litres a minute. How many minutes does it take to "
        "fill a tank of 600 litres?",
        "The tank gains 40 - 10 = 30 litres a minute. It is full after 600 / 30 = 20 minutes. #### 20",
    ),
    (
        "Lena reads 14 pages a day for a week and then 20 pages a day for 3 days. How many pages does she read?",
        "In the week she reads 14 x 7 = 98 pages. In the 3 days she reads 20 x 3 = 60 pages. That makes 98 + 60 = "
        "158 pages. #### 158",
    ),
    (
        "A gardener plants 3 rows of 15 tulips and twice as many daffodils as tulips. How many flowers does he plant?",
        "He plants 3 x 15 = 45 tulips and 45 x 2 = 90 daffodils. Together these are 45 + 90 = 135 flowers. #### 135",
    ),
    (
        "Ivo has $200. He spends a quarter of it on shoes and $35 on a book. How many dollars does he have left?",
        "The shoes cost 200 / 4 = 50 dollars. He has 200 - 50 - 35 = 115 dollars left. #### 115",
    ),
)


def load(source: Source, *, shots: int = 8, shots_from: str = "own") -> list[Row]:
    """The test problems behind ``shots`` worked examples, ``own`` or of the ``train`` split.

    Raises:
        ValueError: for a record without a field, a solution without ``#### number``, or more shots than there are.
    """
    choice("shots_from", shots_from, ("own", "train"))
    count("shots", shots, 0)
    examples = list(OWN_SHOTS) if shots_from == "own" else _problems(source, "train", TRAIN_FILES)
    if shots > len(examples):
        raise ValueError(f"shots_from {shots_from} has {len(examples)} worked examples, {shots} were asked for")
    context = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples[:shots])
    return [row("gsm8k", context, question, [answer]) for question, answer in _problems(source, "test", FILES)]


def _problems(source: Source, split: str, files: Sequence[str]) -> list[tuple[str, str]]:
    if source.data_dir is None:
        found = hub_records(HUB, CONFIG, split, files)
    else:
        found = read_records(find_file(source.data_dir, files))
    problems = []
    for where, record in found:
        answer = _one_line(_CALCULATION.sub("", get(record, "answer", where)))
        if marked_number(answer) is None:
            raise ValueError(f"{where}: field 'answer' must end in '#### number', found {answer[-60:]!r}")
        problems.append((_one_line(get(record, "question", where)), answer))
    return problems


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").rstrip(".")


def marked_number(text: str) -> str | None:
    """The number after the first ``####``; None without one."""
    found = _MARKED.search(text)
    return found and _plain(found.group(1))


def final_number(text: str) -> str | None:
    """The number after ``####``, else the last number of a text; None without any."""
    numbers = _NUMBER.findall(text)
    return marked_number(text) or (_plain(numbers[-1]) if numbers else None)


def _said(record: Row) -> str:
    """The prediction up to the end of its line, where the worked examples end too."""
    return record["pred"].strip().split("\n")[0]


def _reference(record: Row) -> str | None:
    """The solution's number: behind ``####``, or by itself."""
    answer = record["answers"][0].strip()
    return marked_number(answer) or (_plain(answer) if _NUMBER.fullmatch(answer) else None)


def refuse(record: Row) -> str | None:
    """Why a record cannot be scored."""
    if _reference(record) is None:
        found = shown(record["answers"][0])
        return f"field 'answers' must be a solution that ends in '#### number', or the number, found {found}"
    return None


def exact_match(record: Row) -> float:
    """1 if the final number is the solution's."""
    return float(final_number(_said(record)) == _reference(record))


def strict_match(record: Row) -> float:
    """1 if the number after ``####`` is the solution's."""
    return float(marked_number(_said(record)) == _reference(record))


def details(records: Sequence[Row]) -> dict[str, float]:
    """The strict score."""
    return {"strict": percent([strict_match(record) for record in records])}


TASK = Task("gsm8k", TEMPLATE, MAX_NEW_TOKENS, raw=True, newline_stop=True)
SUITE = Suite("gsm8k", (Benchmark(TASK, load, exact_match, details, refuse=refuse),))
