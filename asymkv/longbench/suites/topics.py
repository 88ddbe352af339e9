"""Topic retrieval: a long conversation about many topics, and which of them was talked about first.

The task is LongEval's (LongChat) and, with questions for the second and third topic, L-Eval's TopicRet (arXiv
2307.11088), which the AsymKV paper reports. Rows are read from LongEval's test cases (``prompt, topics``) or
L-Eval's file (``input, instructions, outputs``) in ``--data-dir``, or generated from this package's own topics and
local text (without ``--data-dir``, or with option ``generate``). Asked in a chat turn where the model has a chat
template. Scored as L-Eval does: the topic occurs in the prediction, case and spaces aside (LongEval asks a judge
model instead).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from asymkv.longbench.data import Row, Task
from asymkv.longbench.suites.base import Benchmark, Source, Suite, choice, count, find_file, get, read_records, row
from asymkv.longbench.suites.haystack import Text, load_text

TEMPLATE = "Read this record of a conversation, then answer the question at its end.\n\n{context} {input}"
MAX_NEW_TOKENS = 50
FILES = ("topic_retrieval.jsonl", "topic_retrieval_longchat.jsonl")
# Where LongEval's prompts turn from the record to the question.
RECORD_END = "Now the record ends."
ORDINALS = ("first", "second", "third")
TOPICS = (
    "growing tomatoes on a balcony", "the history of lighthouses", "repairing old bicycles", "how bread rises",
    "learning to play the cello", "the migration of storks", "the design of public libraries", "running a marathon",
    "the chemistry of soap", "night trains through Europe", "keeping bees in a city", "the rules of curling",
    "painting with watercolours", "the life of river otters", "restoring wooden furniture", "how tides are predicted",
    "writing letters by hand", "the taste of mountain cheese", "building a kite", "the acoustics of concert halls",
    "the invention of the zipper", "mushrooms of the autumn forest", "folding paper animals", "towns without cars",
    "the care of house plants", "how glaciers shape valleys", "the art of making maps", "teaching chess to children",
    "the work of a ship's pilot", "weaving on a hand loom", "the stars of the winter sky", "brewing tea",
    "the return of the wolf", "photographing birds in flight", "how bridges are tested", "the language of road signs",
    "baking with sourdough", "the daily life of a beekeeper", "insulating an old house", "walking long-distance trails",
)  # fmt: skip


def load(
    source: Source, *, topics: int = 10, rows: int = 20, words: int = 120, ask: Sequence[int] | None = None,
    generate: bool | None = None, text: str | None = None, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """Published rows of ``--data-dir``; without a folder, generated ones.

    Args:
        source: where to look.
        topics: topics of a conversation; of LongEval's files, the one with so many (``<n>_topics.jsonl``) is also read.
        rows: conversations that are generated.
        words: what is said about each generated topic, in words.
        ask: which topics are asked for, 1 to 3; each question is a row. None: the first of generated conversations, and
            whatever published ones ask. Of L-Eval's the questions in these places; LongEval's ask for the first only.
        generate: whether to generate rows; None = where there is no ``--data-dir``.
        text: file or folder of text that the generated conversations are made of.
        seed: of topics and text.

    Raises:
        FileNotFoundError: if the folder has none of the files.
        ValueError: for bad settings, a record that has neither format, or one that lacks what is asked for.
    """
    if ask is not None and (not isinstance(ask, (list, tuple)) or not ask):
        raise ValueError(f"ask must be a list of the topics' numbers, found {ask!r}")
    for number in ask or ():
        choice("ask", number, tuple(range(1, len(ORDINALS) + 1)))
    count("topics", topics, max(ask or (1,)))
    if source.data_dir is not None and not generate:
        found = read_records(find_file(source.data_dir, (*FILES, f"{topics}_topics.jsonl")))
        return [made for where, record in found for made in _asked(_published(where, record), ask, where)]
    if topics > len(TOPICS):
        raise ValueError(f"there are {len(TOPICS)} topics to talk about, {topics} were asked for")
    chosen = load_text(source, text)
    rngs = (random.Random(f"topic_retrieval-{seed}-{index}") for index in range(count("rows", rows)))
    return [made for rng in rngs for made in _generated(chosen, rng, topics, count("words", words), ask or (1,))]


def _asked(rows: list[Row], ask: Sequence[int] | None, where: str) -> list[Row]:
    """The questions in these places."""
    if ask is not None and max(ask) > len(rows):
        raise ValueError(f"{where} asks for {len(rows)} of its topics; ask={list(ask)} needs {max(ask)}")
    return rows if ask is None else [rows[number - 1] for number in ask]


def _published(where: str, record: Row) -> list[Row]:
    """Rows of one record: LongEval's test case, or L-Eval's document with its questions."""
    if "prompt" in record:
        prompt, topics = get(record, "prompt", where), get(record, "topics", where, list)
        cut = prompt.rfind(RECORD_END)
        if cut < 0 or not topics:
            raise ValueError(f"{where}: field 'prompt' must contain {RECORD_END!r}, and 'topics' a topic")
        return [_row(prompt[:cut].rstrip(), prompt[cut:], str(topics[0]), topics=len(topics))]
    context = get(record, "input", where)
    questions, topics = (get(record, name, where, list) for name in ("instructions", "outputs"))
    if len(questions) != len(topics):
        raise ValueError(f"{where}: {len(questions)} 'instructions' for {len(topics)} 'outputs'")
    return [_row(context, question, topic) for question, topic in zip(questions, topics, strict=True)]


def _generated(text: Text, rng: random.Random, topics: int, words: int, ask: Sequence[int]) -> list[Row]:
    chosen = rng.sample(TOPICS, topics)
    start = rng.randrange(len(text.sentences))
    parts = [
        f"This is the record of our conversation on {topics} topics. You are the ASSISTANT, I am the USER. I open each "
        "topic with the words 'I would like to discuss the topic of'. At the end I will ask about the topics."
    ]
    for topic in chosen:
        said, total = [], 0
        while total < words:
            said += text.take(1, start)
            start += 1
            total += len(said[-1].split())
        half = max(len(said) // 2, 1)
        first, second = (" ".join(part) for part in (said[:half], said[half:]))
        parts.append(f"USER: I would like to discuss the topic of {topic}.\nASSISTANT: Gladly. {first}")
        parts.append(f"USER: Tell me more.\nASSISTANT: {second or first}\nUSER: Thank you, let us take the next topic.")
    context = "\n".join(parts)
    return [
        _row(context, f"{RECORD_END} What is the {ORDINALS[n - 1]} topic that we discussed? Give only the topic.",
             chosen[n - 1], topics=topics, source=text.name)
        for n in ask
    ]  # fmt: skip


def _row(context: str, question: str, topic: str, **extra: object) -> Row:
    return row("topic_retrieval", context, question, [topic], **extra)


def _squeezed(text: str) -> str:
    return "".join(text.lower().split())


def topic_named(record: Row) -> float:
    """1 if the topic occurs in the prediction, case and spaces aside."""
    return float(_squeezed(record["answers"][0]) in _squeezed(record["pred"]))


TASK = Task("topic_retrieval", TEMPLATE, MAX_NEW_TOKENS, record_fields=("topics", "source"))
SUITE = Suite("topic_retrieval", (Benchmark(TASK, load, topic_named),))
