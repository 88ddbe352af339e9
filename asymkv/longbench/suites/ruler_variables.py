"""RULER's variable tracking: chains of assignments in filler, and the names that hold the first chain's value.

One worked example of the same form comes before the task, as in RULER.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from functools import partial

from asymkv.longbench.data import Row, Task
from asymkv.longbench.suites.base import Benchmark, Reader, Source, count, row
from asymkv.longbench.suites.haystack import Text, filler, load_text
from asymkv.longbench.suites.ruler_common import LENGTHS, ROWS, filler_kind, largest, rows_by_length, string_match_all

QUESTION = (
    "Variables are assigned in the text below, some of them from other variables. Follow the assignments."
    "\n\n{context}\n\nQuestion: Which variables in the text above hold the value {input}?"
)
ANSWER_PREFIX = "Answer: By the assignments in the text above, {holders} variables hold the value {input}, namely:"
NOISE = "The lamp is lit, the kettle is warm, and nothing else happens in this room."
NAME_LETTERS, EXAMPLE_LETTERS = 5, 3
EXAMPLE_PIECES = 5
MAX_VARIABLES = 1000
MAX_NEW_TOKENS = 30


def make_chains(rng: random.Random, chains: int, hops: int, letters: int) -> list[tuple[str, list[str]]]:
    """Chains as (value, names): the first name holds the value, each later one takes it from the name before."""
    names: list[str] = []
    while len(names) < chains * (hops + 1):
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    values = [str(value) for value in rng.sample(range(10_000, 100_000), chains)]
    return [(value, names[i * (hops + 1) : (i + 1) * (hops + 1)]) for i, value in enumerate(values)]


def _statements(value: str, names: Sequence[str]) -> list[str]:
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {origin}" for name, origin in zip(names, sources, strict=True)]


def hide(
    pieces: Sequence[str], chains: Sequence[tuple[str, list[str]]], places: Sequence[Sequence[float]]
) -> list[str]:
    """The pieces with every chain's statements at its places (shares of the pieces), in the chain's order."""
    found = [
        (int(place * (len(pieces) + 1)), statement)
        for (value, names), depths in zip(chains, places, strict=True)
        for place, statement in zip(sorted(depths), _statements(value, names), strict=True)
    ]
    found.sort(key=lambda entry: entry[0])
    out, taken = [], 0
    for index in range(len(pieces) + 1):
        while taken < len(found) and found[taken][0] == index:
            out.append(found[taken][1] + ".")
            taken += 1
        out += pieces[index : index + 1]
    return out


def _example(rng: random.Random, chains: int, hops: int) -> str:
    """A small task of the same form with its answer."""
    made = make_chains(rng, chains, hops, EXAMPLE_LETTERS)
    places = [[rng.random() for _ in names] for _, names in made]
    context = "\n".join(hide([NOISE] * EXAMPLE_PIECES, made, places))
    value, names = made[0]
    asked = QUESTION.format(context=context, input=value)
    return f"{asked}\n{ANSWER_PREFIX.format(holders=len(names), input=value)} {', '.join(names)}\n\n"


def _row(
    task: Task, text: Text, chains: int, hops: int, haystack: str, reader: Reader, rng: random.Random, limit: int,
    index: int,
) -> Row:  # fmt: skip
    example = _example(rng, chains, hops)
    made = make_chains(rng, chains, hops, NAME_LETTERS)
    places = [[rng.random() for _ in names] for _, names in made]
    pieces, joint = filler(text, haystack, NOISE, limit, reader, rng)
    value, names = made[0]
    extra = {"example": example, "holders": len(names), "source": text.name if haystack == "text" else "noise"}

    def make(used: int) -> Row:
        return row(task.dataset, joint.join(hide(pieces[:used], made, places)), value, names, **extra)

    return largest(task, reader, limit, reader.sizes(pieces), make)


def variable_tracking(
    source: Source, *, lengths: Sequence[int] = LENGTHS, rows: int = ROWS, chains: int = 1, hops: int = 4,
    haystack: str = "noise", text: str | None = None, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """``chains`` chains of ``hops`` assignments from a variable; the first chain's value is asked for."""
    count("chains", chains)
    count("hops", hops, 0)
    if chains * (hops + 1) > MAX_VARIABLES:
        raise ValueError(
            f"{chains} chains of {hops} hops have {chains * (hops + 1)} variables, at most {MAX_VARIABLES}"
        )
    filler_kind(haystack)
    make = partial(_row, TASK, load_text(source, text), chains, hops, haystack)
    return rows_by_length(TASK, source, lengths, rows, seed, make)


TASK = Task(
    "ruler_vt", "{example}" + QUESTION, MAX_NEW_TOKENS, answer_prefix=ANSWER_PREFIX, all_answers=True,
    record_fields=("target_len", "source"),
)  # fmt: skip
BENCHMARKS = (Benchmark(TASK, variable_tracking, string_match_all),)
