"""One row with several questions on one context: each on a copy of the compressed context, or one after another.

``shared``: the context is compressed before any question is known, once; every question and its answer are appended to
a copy of that cache as they are. ``multi_turn``: the questions follow one another on one cache; what is fed after an
answer (the answer itself where it is the gold one, and the next question) is a further prompt to the cache, which
compresses it by its method; an arm that only compresses a first prompt is refused there. The first question is in view
while the context is compressed under protocol ``prompt``, and follows it under protocol ``context``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from asymkv.cache import CompressedCache
from asymkv.compress import frozen_fork
from asymkv.longbench import measure as single
from asymkv.longbench import retention
from asymkv.longbench.arms import ArmError, BaseArm
from asymkv.longbench.data import Row, Task
from asymkv.longbench.memory import DeviceMemory, HostMemory
from asymkv.longbench.models import devices_of
from asymkv.longbench.prompts import Prompt, answer_ids, check_questions_fit, follow_up, shared_prompts, takes_chat

Record = dict[str, Any]
SHARED, GOLD = "shared", "gold"
SUMMED = ("question_tokens", "question_seconds", "new_tokens", "decode_steps", "decode_seconds", "gold_tokens")


@dataclasses.dataclass
class _Asked:
    """A question that a cache has read.

    Args:
        turn: the question and its references.
        prompt: the question as tokens.
        cache: holds context and question.
        logits: ``[V]`` after its last token.
        fed: tokens fed since the last turn.
        seconds: time that they took.
    """

    turn: Row
    prompt: Prompt
    cache: Any
    logits: Tensor
    fed: int
    seconds: float


def check_turns(subject: single.Subject, task: Task, row: Row, protocol: single.Protocol) -> None:
    """Checks what a row of several questions wants of the protocol and of the model's prompt limit.

    Raises:
        ValueError: for ``shared`` under protocol ``prompt``, where a question would be in view; for a conversation on
            the model's own answers where none are generated; for questions that leave no room for the context.
    """
    shared = row["mode"] == SHARED
    if shared and protocol.name != "context":
        raise ValueError(
            f"{task.dataset}: mode 'shared' compresses the context before any question is known; "
            f"it runs under protocol context, found {protocol.name}"
        )
    if not shared and row["earlier"] != GOLD and not protocol.generate:
        raise ValueError(f"{task.dataset}: earlier 'model' goes on from the model's answers, so they must be generated")
    questions, reserve = _first_questions(subject, task, row, protocol)
    check_questions_fit(row, questions, task.template, subject.tokenizer, subject.spec, reserve)


def check_arm(arm: BaseArm, row: Row) -> None:
    """Raises ArmError where an arm does not compress what a conversation adds after its first prompt."""
    if row["mode"] != SHARED and not arm.goes_on:
        raise ArmError(
            f"{arm.name} compresses one prompt and leaves what follows as it is, so that it would store more than its "
            f"share of a conversation; ask it the questions of {row['dataset']} with option mode 'shared'"
        )


def measure_turns(subject: single.Subject, arm: BaseArm, task: Task, row: Row, protocol: single.Protocol) -> Record:
    """Runs one row of several questions; the record has one prediction, loss and score entry per question.

    Memory covers all questions, as in :func:`asymkv.longbench.measure.measure`.

    Raises:
        ValueError: see :func:`check_turns`.
        ArmError: see :func:`check_arm`.
        StoredTooMuchError: if the cache holds more than the arm allows.
    """
    check_turns(subject, task, row, protocol)
    check_arm(arm, row)
    prompts = _prompts(subject, task, row, protocol)
    prompts = [prompt.without_context() for prompt in prompts] if arm.bare else prompts
    first, rest = retention.split_prompt(prompts[0], protocol.name)
    host, accelerators = HostMemory(), DeviceMemory(*devices_of(subject.model))
    clock = single.Clock(subject.model)
    prefix = retention.compress(subject.model, first)
    seconds = clock.lap()
    arm.check(prefix.cache, len(first), 0)
    record = {
        "_id": row["_id"], "dataset": task.dataset, "all_classes": None, "length": row.get("length"),
        "prompt_tokens": len(first), "removed_tokens": prompts[0].removed_tokens, "prefill_seconds": seconds,
        **{key: row[key] for key in task.record_fields if key in row},
        **arm.stored(prefix.cache, subject.model),
    }  # fmt: skip
    if row["mode"] == SHARED:
        turns = list(_on_copies(subject, arm, task, row, protocol, prompts, prefix, len(first)))
    else:
        turns = list(_in_turn(subject, arm, task, row, protocol, prompts[0], prefix, len(first), rest))
    return record | _joined(turns) | host.result() | accelerators.result()


def _first_questions(subject: single.Subject, task: Task, row: Row, protocol: single.Protocol) -> tuple[list[str], int]:
    """Questions that are asked right behind the context, and the tokens that all later turns of a row may have."""
    questions = [turn["input"] for turn in row["turns"]]
    if row["mode"] == SHARED:
        return questions, 0
    later = [follow_up(question, subject.tokenizer, chat=_chats(subject, task)) for question in questions[1:]]
    earlier = [_room(subject, task, row, turn, protocol) for turn in row["turns"][:-1]]
    return questions[:1], sum(len(prompt.question_ids) for prompt in later) + sum(earlier)


def _prompts(subject: single.Subject, task: Task, row: Row, protocol: single.Protocol) -> list[Prompt]:
    """The questions behind the context; in a conversation, only the first one, with room left for what follows."""
    questions, reserve = _first_questions(subject, task, row, protocol)
    return shared_prompts(row, questions, task.template, subject.tokenizer, subject.spec, raw=task.raw, reserve=reserve)


def _room(subject: single.Subject, task: Task, row: Row, turn: Row, protocol: single.Protocol) -> int:
    """Tokens that an answer may have which later turns follow."""
    if row["earlier"] != GOLD:
        return _limit(task, turn, protocol)
    ids = subject.tokenizer(task.gold(turn["answers"])[0], add_special_tokens=False, verbose=False)["input_ids"]
    # One more for the space that may join it.
    return min(len(ids) + 1, protocol.max_gold_tokens)


def _chats(subject: single.Subject, task: Task) -> bool:
    return takes_chat(subject.spec, task.dataset, task.raw)


def _limit(task: Task, turn: Row, protocol: single.Protocol) -> int:
    longest = turn.get("max_new_tokens", task.max_new_tokens)
    return min(longest, protocol.max_new_tokens or longest)


def _on_copies(
    subject: single.Subject, arm: BaseArm, task: Task, row: Row, protocol: single.Protocol, prompts: Sequence[Prompt],
    prefix: retention.Prefix, tokens: int,
) -> Iterator[Record]:  # fmt: skip
    """Each question on a copy of the cache of ``tokens`` tokens, where nothing is compressed any more."""
    for turn, prompt in zip(row["turns"], prompts, strict=True):
        clock = single.Clock(subject.model)
        own = frozen_fork(prefix.cache)
        logits = single.feed(subject.model, own, prompt.question_ids)
        asked = _Asked(turn, prompt, own, logits, len(prompt.question_ids), clock.lap())
        record, _ = _answer(subject, task, asked, protocol, own)
        arm.check(own, tokens, asked.fed + record["decode_steps"])
        yield record


def _in_turn(
    subject: single.Subject, arm: BaseArm, task: Task, row: Row, protocol: single.Protocol, first: Prompt,
    prefix: retention.Prefix, tokens: int, rest: Sequence[int],
) -> Iterator[Record]:  # fmt: skip
    """The questions one after another on the cache, which has read ``tokens`` tokens; ``rest`` is still to be fed."""
    cache, logits, new = prefix.cache, prefix.last_logits, list(rest)
    gold = row["earlier"] == GOLD
    for number, turn in enumerate(row["turns"]):
        prompt = first if number == 0 else follow_up(turn["input"], subject.tokenizer, chat=_chats(subject, task))
        clock = single.Clock(subject.model)
        new += prompt.question_ids if number else []
        if new:
            logits = single.feed(subject.model, cache, new)
        asked = _Asked(turn, prompt, cache, logits, len(new), clock.lap())
        used = _fork(cache) if gold else cache
        record, unfed = _answer(subject, task, asked, protocol, used)
        arm.check(used, tokens, len(new) + arm.uncompacted(record["decode_steps"]))
        yield record
        tokens += len(new) + (0 if gold else record["decode_steps"])
        new = _gold_ids(subject, task, asked, protocol) if gold else unfed


def _fork(cache: Any) -> Any:
    return cache.fork() if isinstance(cache, CompressedCache) else copy.deepcopy(cache)


def _gold_ids(subject: single.Subject, task: Task, asked: _Asked, protocol: single.Protocol) -> list[int]:
    answers = task.gold(asked.turn["answers"])
    return answer_ids(asked.prompt, answers[0], subject.tokenizer, protocol.max_gold_tokens)


def _answer(
    subject: single.Subject, task: Task, asked: _Asked, protocol: single.Protocol, cache: Any
) -> tuple[Record, list[int]]:
    """Loss of the gold answer, and the greedy answer after a question; also the ids said but not fed to ``cache``."""
    gold = _gold_ids(subject, task, asked, protocol)
    state = retention.Prefix(asked.cache, asked.logits)
    loss = retention.answer_nll(subject.model, state, [], gold) if gold else None
    record = {
        "answers": asked.turn["answers"], "question_tokens": asked.fed, "question_seconds": asked.seconds,
        "nll": loss, "gold_tokens": len(gold), "stored_bytes": asked.cache.nbytes, "decode_steps": 0,
    }  # fmt: skip
    record |= {"task": asked.turn["task"]} if "task" in asked.turn else {}
    if not protocol.generate:
        return record, []
    clock, limit = single.Clock(subject.model), _limit(task, asked.turn, protocol)
    said, fed = single.greedy(subject.model, cache, asked.logits, limit, subject.stop_ids)
    record |= {
        "pred": subject.tokenizer.decode(said, skip_special_tokens=True), "new_tokens": len(said),
        "decode_steps": fed, "decode_seconds": clock.lap(),
    }  # fmt: skip
    return record, said[fed:]


def _joined(turns: Sequence[Record]) -> Record:
    """The turns, their predictions and references in order, the mean of their losses, and the sums of the rest."""
    losses = [turn["nll"] for turn in turns if turn["nll"] is not None]
    joined: Record = {
        "turns": list(turns),
        "answers": [turn["answers"] for turn in turns],
        "nll": sum(losses) / len(losses) if losses else None,
    }
    joined |= {name: sum(turn.get(name, 0) for turn in turns) for name in SUMMED}
    if all("pred" in turn for turn in turns):
        joined["pred"] = [turn["pred"] for turn in turns]
    return joined
