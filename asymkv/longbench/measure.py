"""One row under one arm: compress, score the gold answer, answer greedily, and record what was stored."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asymkv.checks import check_integer
from asymkv.longbench import retention
from asymkv.longbench.arms import BaseArm, named_refusal
from asymkv.longbench.data import Row, Task
from asymkv.longbench.memory import DeviceMemory, HostMemory, synchronize
from asymkv.longbench.models import ModelSpec, devices_of, input_device
from asymkv.longbench.prompts import Prompt, answer_ids, build_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

Record = dict[str, Any]
# LongBench ends these answers at a newline too, and lets none of them be empty.
NEWLINE_STOP_TASKS = frozenset({"samsum"})


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        model: in eval mode, on its device; patched for the arm that runs.
        tokenizer: the model's.
        spec: how the model is prompted.
        stop_ids: ids that end an answer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    stop_ids: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How it is measured.

    Args:
        name: ``prompt`` (the question is in view while compressing) or ``context`` (it is not known yet).
        max_new_tokens: caps the tasks' own answer lengths.
        generate: whether to answer at all (the gold answer's loss needs no generation).
        max_gold_tokens: the gold answer is cut after so many tokens.
    """

    name: str = "prompt"
    max_new_tokens: int | None = None
    generate: bool = True
    max_gold_tokens: int = 512

    def __post_init__(self) -> None:
        if self.name not in retention.PROTOCOLS:
            raise ValueError(f"unknown protocol {self.name!r}; choose from {', '.join(retention.PROTOCOLS)}")
        if self.max_new_tokens is not None:
            check_integer("max_new_tokens", self.max_new_tokens, 1)
        check_integer("max_gold_tokens", self.max_gold_tokens, 1)


@torch.no_grad()
def measure(
    subject: Subject, arm: BaseArm, task: Task, row: Row, protocol: Protocol, shared: retention.Prefix | None = None
) -> Record:
    """Runs one row and returns its record, all plain json types; a row of several questions has them in ``turns``.

    Times are seconds of prefill, of the rest of the prompt and of decoding. ``peak_rss_bytes`` (and
    ``device_peak_bytes`` on accelerators) is the most that the process held in this row, the model included, and
    ``..._increase_bytes`` what came on top of the row's start; both cover prefill, gold answer and decoding.
    ``shared``: the arm's prefix from a prefill that served several arms, whose time is nobody's: None.

    Raises:
        StoredTooMuchError: if the cache holds more than the arm allows.
        ArmError: if the arm's method refuses the prompt; names dataset and row.
    """
    with named_refusal(arm, task.dataset, row["_id"]):
        if "turns" in row:
            from asymkv.longbench.turns import measure_turns

            return measure_turns(subject, arm, task, row, protocol)
        return _measure(subject, arm, task, row, protocol, shared)


def _measure(
    subject: Subject, arm: BaseArm, task: Task, row: Row, protocol: Protocol, shared: retention.Prefix | None
) -> Record:
    prompt = prompt_of(subject, arm, task, row)
    first, rest = retention.split_prompt(prompt, protocol.name)
    host, accelerators = HostMemory(), DeviceMemory(*devices_of(subject.model))
    clock = Clock(subject.model)
    prefix = shared or retention.compress(subject.model, first)
    seconds = None if shared else clock.lap()
    arm.check(prefix.cache, len(first), 0)
    record = {
        "_id": row["_id"], "dataset": task.dataset, "answers": row["answers"], "all_classes": row.get("all_classes"),
        "length": row.get("length"), "prompt_tokens": len(first), "question_tokens": len(rest),
        "removed_tokens": prompt.removed_tokens, "prefill_seconds": seconds,
    }  # fmt: skip
    record |= {key: row[key] for key in ("depth", "target_len", "target_unit", *task.record_fields) if key in row}
    record |= arm.stored(prefix.cache, subject.model)
    record |= _gold_loss(subject, prompt, prefix, rest, task.gold(row["answers"]), protocol)
    if protocol.generate:
        record |= _answer(subject, arm, task, prefix, len(first), rest, protocol)
    return record | host.result() | accelerators.result()


def prompt_of(subject: Subject, arm: BaseArm, task: Task, row: Row) -> Prompt:
    """A row's prompt, without the context for an arm that never reads it."""
    prompt = build_prompt(
        row, task.dataset, task.template, subject.tokenizer, subject.spec,
        raw=task.raw, answer_prefix=task.answer_prefix,
    )  # fmt: skip
    return prompt.without_context() if arm.bare else prompt


class Clock:
    """Wall time between laps, with the queues of the model's devices emptied."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.devices = tuple(devices_of(model))
        self.lap()

    def lap(self) -> float:
        """Seconds since the last lap."""
        synchronize(*self.devices)
        now = time.perf_counter()
        elapsed, self.last = now - getattr(self, "last", now), now
        return elapsed


def _gold_loss(
    subject: Subject,
    prompt: Prompt,
    prefix: retention.Prefix,
    rest: Sequence[int],
    answers: Sequence[str],
    protocol: Protocol,
) -> Record:
    """Mean token loss of the first reference answer; None where there is none."""
    gold = answer_ids(prompt, answers[0], subject.tokenizer, protocol.max_gold_tokens) if answers else []
    loss = retention.answer_nll(subject.model, prefix, rest, gold) if gold else None
    return {"nll": loss, "gold_tokens": len(gold)}


def _answer(
    subject: Subject,
    arm: BaseArm,
    task: Task,
    prefix: retention.Prefix,
    tokens: int,
    rest: Sequence[int],
    protocol: Protocol,
) -> Record:
    """Feeds what is left of the prompt and decodes greedily, on the prefix's own cache (its last use)."""
    limit = min(task.max_new_tokens, protocol.max_new_tokens or task.max_new_tokens)
    stops = subject.stop_ids
    not_empty = task.newline_stop or task.dataset.removesuffix("_e") in NEWLINE_STOP_TASKS
    if not_empty:
        stops = stops | {subject.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]}
    clock = Clock(subject.model)
    logits = feed(subject.model, prefix.cache, rest) if rest else prefix.last_logits
    question_seconds = clock.lap()
    said, fed = greedy(subject.model, prefix.cache, logits, limit, stops, not_empty=not_empty)
    seconds = clock.lap()
    arm.check(prefix.cache, tokens, len(rest) + arm.uncompacted(fed))
    return {
        "pred": subject.tokenizer.decode(said, skip_special_tokens=True),
        "question_seconds": question_seconds,
        "new_tokens": len(said),
        "decode_steps": fed,
        "decode_seconds": seconds,
    }


def greedy(
    model: PreTrainedModel,
    cache: Cache,
    logits: Tensor,
    limit: int,
    stops: frozenset[int],
    *,
    not_empty: bool = False,
) -> tuple[list[int], int]:
    """Greedy decoding on a filled cache.

    Args:
        model: the model.
        cache: grows by one token a step.
        logits: ``[V]`` after the last token fed.
        limit: most new tokens.
        stops: ids that end the answer and are not part of it.
        not_empty: forbids a stop as the first token.

    Returns:
        The new ids, and how many of them were fed back (decode steps).
    """
    said: list[int] = []
    if not_empty:
        logits = logits.index_fill(0, torch.tensor(sorted(stops), device=logits.device), -torch.inf)
    for step in range(limit):
        if step:
            logits = feed(model, cache, said[-1:])
        token = int(logits.argmax())
        if token in stops:
            return said, len(said)
        said.append(token)
    return said, max(len(said) - 1, 0)


def feed(model: PreTrainedModel, cache: Cache, ids: Sequence[int]) -> Tensor:
    """Logits ``[V]`` after ``ids``, which are appended to the cache."""
    batch = torch.tensor([list(ids)], device=input_device(model))
    return model(batch, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
