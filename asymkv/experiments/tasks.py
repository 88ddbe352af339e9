"""Answers beside perplexity: summaries scored by ROUGE, and LongBench's rows."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

import asymkv
from asymkv.experiments.arms import SuiteArm
from asymkv.experiments.corpus import Article
from asymkv.experiments.measure import Record
from asymkv.longbench.arms import Arm
from asymkv.longbench.data import Row, Task
from asymkv.longbench.measure import Protocol, Subject, measure
from asymkv.longbench.metrics import score_sample

TAIL = "\n\nTL;DR:"
ROUGES = ("rouge1", "rouge2", "rougeL")


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError("summaries are scored by the package rouge_score: pip install 'asymkv[eval]'") from None
    return RougeScorer(ROUGES, use_stemmer=True)


def rouge(reference: str, said: str) -> Record:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, in [0, 1], words stemmed."""
    return {name: score.fmeasure for name, score in _scorer().score(reference, said).items()}


def article_room(tokenizer: Any, window: int, new_tokens: int) -> int:
    """Tokens of an article that a window holds beside ``TL;DR:`` and the answer.

    Raises:
        ValueError: for a window that holds none.
    """
    tail = len(tokenizer(TAIL, add_special_tokens=False)["input_ids"])
    if window <= tail + new_tokens:
        raise ValueError(f"a window of {window} tokens has no room for an article beside {tail} of {TAIL.strip()!r} "
                         f"and an answer of {new_tokens}; at least {tail + new_tokens + 1} are needed")
    return window - tail - new_tokens


def summarise(subject: Subject, arm: SuiteArm, article: Article, window: int, new_tokens: int) -> Record:
    """A greedy summary of an article, cut at its end to what the window holds, after ``TL;DR:``.

    Args:
        window: tokens of article, tail and answer at most.
        new_tokens: of the answer at most.

    Raises:
        ValueError: for a window without room for an article.
    """
    model, tokenizer = subject.model, subject.tokenizer
    room = article_room(tokenizer, window, new_tokens)
    tail = tokenizer(TAIL, add_special_tokens=False)["input_ids"]
    body = tokenizer(article.text, verbose=False)["input_ids"][:room]
    ids = torch.tensor([body + tail], device=model.device)
    with asymkv.replace(model.config.model_type, arm.config, model=model), torch.no_grad():
        started = time.perf_counter()
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0, return_dict_in_generate=True,
        )  # fmt: skip
        seconds = time.perf_counter() - started
    said = str(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)).strip()
    return {**rouge(article.summary, said), "stored_bytes": out.past_key_values.nbytes, "prompt_tokens": ids.shape[1],
            "seconds": seconds, "pred": said}  # fmt: skip


def answer_row(subject: Subject, arm: SuiteArm, task: Task, row: Row, protocol: Protocol) -> Record:
    """A LongBench row's score by its own metric, and what it stored."""
    with asymkv.replace(subject.model.config.model_type, arm.config, model=subject.model):
        found = measure(subject, Arm(arm.name, arm.config), task, row, protocol)
    score = score_sample(task.dataset, found["pred"], row["answers"], row.get("all_classes"))
    kept = ("nll", "stored_bytes", "full_bytes", "prompt_tokens", "pred")
    return {"score": score, **{name: found[name] for name in kept}}
