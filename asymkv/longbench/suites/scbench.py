"""SCBench: several questions on one long context, asked of one compressed cache (arXiv 2412.10319).

Option ``mode``: ``multi_turn`` (the questions follow one another in a conversation; the answers that the cache holds
are the ``gold`` ones, as SCBench does by default, or the ``model``'s own, option ``earlier``) or ``shared`` (the
context is compressed once without any question, and each question is asked of a copy; needs protocol ``context``).

Rows come from SCBench's files (``<dataset>.jsonl`` or ``multi_turn_<name>.jsonl``, with ``context`` and
``multi_turns`` of ``input`` and ``answer``) or the hub. Scores are SCBench's per dataset, the mean over all
questions; a reference that is a plain text is one reference (SCBench's scorer takes it for a list of characters in
two datasets). Instructions are this package's own wording; turns are those of the chat template where the model has
one. The two datasets that need RepoQA's code scorer (``scbench_repoqa``, ``scbench_repoqa_and_kv``) are not here.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from asymkv.longbench import metrics
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
    turns_of,
)

HUB = "microsoft/SCBench"
MODES, EARLIER = ("multi_turn", "shared"), ("gold", "model")
TEMPLATE = "{intro}\n\n{context}\n\n{input}"
LETTERS = "ABCD"
NUMBER = re.compile(r"\d+\.\d+|\d+")
CHOICE_SIGNS = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")
SUMMARY, PASSKEY = "scbench_summary", "scbench_passkey"


def contains(record: Row) -> float:
    """1 if the reference occurs in the prediction, in the same case."""
    return float(record["answers"][0] in record["pred"])


def contains_any(record: Row) -> float:
    """1 if a reference occurs in the prediction, case ignored."""
    said = record["pred"].strip().upper()
    return float(any(answer.upper() in said for answer in record["answers"]))


def contains_all(record: Row) -> float:
    """Share of the references that occur in the prediction, case ignored, two decimals."""
    said = record["pred"].lower()
    return round(sum(answer.lower() in said for answer in record["answers"]) / len(record["answers"]), 2)


def character_f1(record: Row) -> float:
    """Best F1 over characters, without punctuation and spaces."""
    return max(metrics.token_f1(_characters(record["pred"]), _characters(answer)) for answer in record["answers"])


def _characters(text: str) -> list[str]:
    return [char for char in text.lower() if char not in metrics.PUNCTUATION_ZH and not char.isspace()]


def right_choice(record: Row) -> float:
    """1 if the prediction names the right choice, by its letter or its text (InfiniteBench's rules)."""
    text, letter = record["answers"]
    said = record["pred"].strip()
    if not said:
        return 0.0
    if said[0] in LETTERS:
        return float(said[0] in (text, letter))
    if said in (text, letter):
        return 1.0
    plain = re.sub(" +", " ", said.translate(CHOICE_SIGNS))
    for prefix in CHOICE_PREFIXES:
        place = plain.find(prefix)
        if place >= 0:
            return float(plain[place + len(prefix) + 1 :].startswith((text, letter)))
    named = next((word for word in plain.split() if word in LETTERS), None)
    return float(named in (text, letter))


def first_number(record: Row) -> float:
    """1 if the first number of the prediction is the reference; a fraction is cut off where the reference is whole."""
    found, wanted = NUMBER.search(record["pred"]), record["answers"][0]
    if found is None:
        return 0.0
    value = float(found.group())
    return float(value == float(wanted) if "." in wanted else int(value) == int(wanted))


def first_digits(record: Row) -> float:
    """1 if the first run of digits of the prediction is the reference."""
    found = re.search("[0-9]+", record["pred"])
    return float(found is not None and found.group() == record["answers"][0])


def rouge_lsum(record: Row) -> float:
    """ROUGE-Lsum F1 of the ``rouge_score`` package, lines being sentences."""
    return _rouge_scorer().score(record["answers"][0], record["pred"])["rougeLsum"].fmeasure


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ImportError("this metric needs the rouge_score package: pip install asymkv[eval]") from error
    return rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=False)


def summary_or_needle(record: Row) -> float:
    """The score of the turn's own task."""
    return {SUMMARY: rouge_lsum, PASSKEY: first_digits}[record["task"]](record)


def _no_choice(record: Row) -> str | None:
    answers = record["answers"]
    good = len(answers) == 2 and answers[1] in tuple(LETTERS)
    return None if good else f"field 'answers' must be the right choice's text and its letter, found {shown(answers)}"


def _no_number(record: Row) -> str | None:
    answer = record["answers"][0]
    return None if NUMBER.fullmatch(answer) else f"field 'answers' must be a number, found {shown(answer)}"


def _no_task(record: Row) -> str | None:
    good = record["task"] in (SUMMARY, PASSKEY)
    return None if good else f"field 'task' must be {SUMMARY} or {PASSKEY}, found {shown(record['task'])}"


def _plain_question(turn: Row, where: str) -> str:
    return get(turn, "input", where)


def _named_question(turn: Row, where: str) -> str:
    return f"Question: {get(turn, 'input', where)}\nAnswer:"


def _choice_question(turn: Row, where: str) -> str:
    options = get(turn, "options", where, list)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"Question: {get(turn, 'input', where)}\n{listed}\n\nThe letter of the right answer is"


def _number_question(turn: Row, where: str) -> str:
    text = get(turn, "input", where)
    target = re.search("The (.+) is", text)
    return text if target is None else f"What is the {target.group(1).lower()}?\n\n{text}"


def _answers(turn: Row, where: str) -> list[str]:
    value = get(turn, "answer", where, (str, int, float, list, tuple))
    answers = [str(entry) for entry in value] if isinstance(value, (list, tuple)) else [str(value)]
    if not answers:
        raise ValueError(f"{where}: field 'answer' is empty")
    return answers


def _choice_answers(turn: Row, where: str) -> list[str]:
    options, answer = get(turn, "options", where, list), get(turn, "answer", where)
    if answer not in options[: len(LETTERS)]:
        raise ValueError(f"{where}: field 'answer' must be one of the options, found {answer[:60]!r}")
    return [answer, LETTERS[options.index(answer)]]


def _number_answers(turn: Row, where: str) -> list[str]:
    answers = _answers(turn, where)[:1]
    if not re.fullmatch(NUMBER, answers[0]):
        raise ValueError(f"{where}: field 'answer' must be a number, found {answers[0][:60]!r}")
    return answers


@dataclasses.dataclass(frozen=True)
class Kind:
    """One of SCBench's datasets.

    Args:
        intro: what the prompt says before the context.
        max_new_tokens: longest answer; by the turn's own task where turns have one.
        score: of one question.
        question: a turn's question as it is asked.
        answers: a turn's references.
        all_answers: whether an answer must name all references.
        refuse: why a turn cannot be scored, as of a :class:`Benchmark`.
    """

    intro: str
    max_new_tokens: int | dict[str, int]
    score: Callable[[Row], float]
    question: Callable[[Row, str], str] = _plain_question
    answers: Callable[[Row, str], list[str]] = _answers
    all_answers: bool = False
    refuse: Callable[[Row], str | None] | None = None


KINDS = {
    "scbench_kv": Kind("Find the values that belong to keys in this JSON object.", 150, contains),
    "scbench_prefix_suffix": Kind("Find strings by their beginning and end in this list.", 150, contains),
    "scbench_vt": Kind("Follow the assignments of variables in this text.", 30, contains_all, all_answers=True),
    "scbench_qa_eng": Kind("Read this book and answer questions in few words.", 40, contains_any, _named_question),
    "scbench_qa_chn": Kind("Read this book and answer questions in few words.", 40, character_f1, _named_question),
    "scbench_choice_eng": Kind(
        "Read this book and answer questions.", 40, right_choice, _choice_question, _choice_answers,
        refuse=_no_choice,
    ),
    "scbench_many_shot": Kind("Learn from these examples.", 10, contains_any),
    "scbench_mf": Kind(
        "Find numbers in this list.", 5, first_number, _number_question, _number_answers, refuse=_no_number
    ),
    "scbench_summary": Kind("Read these documents.", 200, rouge_lsum),
    "scbench_summary_with_needles": Kind(
        "Read these documents.", {SUMMARY: 800, PASSKEY: 15}, summary_or_needle, refuse=_no_task
    ),
}


def load(
    dataset: str, source: Source, *, mode: str = "multi_turn", earlier: str = "gold", turns: int | None = None
) -> list[Row]:
    """Rows of one of SCBench's datasets.

    Args:
        dataset: its name.
        source: folder or hub.
        mode: ``multi_turn`` or ``shared``.
        earlier: in a conversation, the answers that the cache holds: ``gold`` or the ``model``'s.
        turns: only the first so many questions of a row.

    Raises:
        ValueError: for bad settings, or a record without a field or of another type.
    """
    choice("mode", mode, MODES)
    choice("earlier", earlier, EARLIER)
    if turns is not None:
        count("turns", turns)
    files = (f"{dataset}.jsonl", f"multi_turn_{dataset.removeprefix('scbench_')}.jsonl")
    if source.data_dir is None:
        found = hub_records(HUB, dataset, "test", files)
    else:
        found = read_records(find_file(source.data_dir, files))
    return [_row(dataset, where, record, mode, earlier, turns) for where, record in found]


def _row(dataset: str, where: str, record: Row, mode: str, earlier: str, limit: int | None) -> Row:
    kind = KINDS[dataset]
    listed = get(record, "multi_turns", where, list)[:limit]
    turns = [_turn(kind, turn, f"{where}, turn {number}") for number, turn in enumerate(listed, start=1)]
    if not turns:
        raise ValueError(f"{where}: field 'multi_turns' is empty")
    # A few of SCBench's datasets call the context their input.
    context = get(record, "context" if "context" in record else "input", where)
    first = turns[0]
    extra = {"intro": kind.intro, "turns": turns, "mode": mode, "earlier": earlier}
    return row(dataset, context, first["input"], first["answers"], **extra)


def _turn(kind: Kind, turn: Row, where: str) -> Row:
    made = {"input": kind.question(turn, where), "answers": kind.answers(turn, where)}
    if isinstance(kind.max_new_tokens, dict):
        task = get(turn, "task", where)
        if task not in kind.max_new_tokens:
            raise ValueError(f"{where}: field 'task' must be one of {', '.join(kind.max_new_tokens)}, found {task!r}")
        made |= {"task": task, "max_new_tokens": kind.max_new_tokens[task]}
    return made


def details(score: Callable[[Row], float], records: Sequence[Row]) -> dict[str, float]:
    """Scores by the number of the turn, and by the turns' own tasks."""
    groups: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for number, turn in enumerate(turns_of(record), start=1):
            groups[f"turn {number}"].append(score(turn))
            if "task" in turn:
                groups[turn["task"]].append(score(turn))
    return {name: percent(scores) for name, scores in groups.items()}


def _benchmark(dataset: str, kind: Kind) -> Benchmark:
    longest = kind.max_new_tokens if isinstance(kind.max_new_tokens, int) else max(kind.max_new_tokens.values())
    task = Task(dataset, TEMPLATE, longest, all_answers=kind.all_answers, record_fields=("mode", "earlier"))
    reads = ("task",) if isinstance(kind.max_new_tokens, dict) else ()
    return Benchmark(task, partial(load, dataset), kind.score, partial(details, kind.score), reads, kind.refuse)


SUITE = Suite("scbench", tuple(_benchmark(dataset, kind) for dataset, kind in KINDS.items()))
