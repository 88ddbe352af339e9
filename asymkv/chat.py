"""What a tokenizer's chat template puts around a user's words."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

# Stands for what is said; must survive templates that strip or trim.
FIRST, ANSWER, NEXT = "FIRST-WORDS-1", "ANSWER-WORDS-2", "NEXT-WORDS-3"


@dataclass(frozen=True)
class ChatText:
    """Text around what is said.

    Args:
        prefix: before the first user's words, system prompt included.
        suffix: after a user's words: ends the turn and opens the answer.
        between: after an answer: ends it and opens the next user's turn.
    """

    prefix: str
    suffix: str
    between: str


def chat_text(tokenizer: Any, system: str | None = None) -> ChatText:
    """The parts of a tokenizer's chat template; without a template there is only a newline before the answer.

    Raises:
        ValueError: for a template that repeats or changes what is said.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return ChatText("" if system is None else system + "\n\n", "\n", "\n\n")
    start = [] if system is None else [{"role": "system", "content": system}]
    said = [*start, {"role": "user", "content": FIRST}]
    later = [*said, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": NEXT}]
    prefix, suffix = _split(_render(tokenizer, said), FIRST)
    _, rest = _split(_render(tokenizer, later), ANSWER)
    between, _ = _split(rest, NEXT)
    return ChatText(prefix, suffix, between)


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    # Templates that do not know enable_thinking ignore it; those that do must not open a thought.
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def _split(text: str, mark: str) -> tuple[str, str]:
    parts = text.split(mark)
    if len(parts) != 2:
        raise ValueError(f"the chat template shows a message {len(parts) - 1} times, so that its parts cannot be told; "
                         "pass chat=False, or the token ids themselves")
    return parts[0], parts[1]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a part of a conversation, nothing added."""
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def load_tokenizer(name: str | None, model: PreTrainedModel) -> Any:
    """The tokenizer of that name; None: the model's own.

    Raises:
        ValueError: if it cannot be loaded; says what to change.
    """
    found = name or model.config.name_or_path
    try:
        if not found:
            raise ValueError("the model has no name_or_path")
        return _load(found)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(
            f"the request to repeat the prompt takes a tokenizer, and {found!r} gives none ({error}); pass "
            "tokenizer=<name or folder>, or use asymkv.compress(model, tokenizer, context, ...)"
        ) from error


@functools.cache
def _load(name: str) -> Any:
    return AutoTokenizer.from_pretrained(name)
