"""From a row to token ids: template, middle truncation, chat template, and the split after the context.

A prompt has two sides. The context side ends with the last character of the row's context; the question side is
everything after it, the end of the chat template included. The sides are tokenised separately, so the context can be
compressed before the question is known; their concatenation is what the model reads when it sees both at once.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asymkv.longbench.models import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_FIELD = "{context}"
# Few-shot and completion tasks: the answer continues the text, so a chat turn would break the pattern.
RAW_TASKS = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p", "code_completion"})


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One tokenised prompt.

    Args:
        context_ids: BOS (where the model has one), the chat header, the template up to and including the context.
        question_ids: the rest of the template and of the chat turn.
        question_text: the text of ``question_ids``.
        removed_tokens: prompt tokens that the middle truncation took out.
        bare: the same prompt with an empty context.
    """

    context_ids: list[int]
    question_ids: list[int]
    question_text: str
    removed_tokens: int = 0
    bare: Prompt | None = None

    @property
    def ids(self) -> list[int]:
        """Both sides: what the model reads when the question is in view from the start."""
        return self.context_ids + self.question_ids

    def without_context(self) -> Prompt:
        """Returns the prompt as if the row's context were empty: the floor that a compressed cache must beat."""
        return self if self.bare is None else self.bare


def build_prompt(
    row: Mapping[str, Any],
    dataset: str,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    spec: ModelSpec,
    *,
    raw: bool = False,
    answer_prefix: str = "",
) -> Prompt:
    """Renders, truncates, wraps and tokenises one row.

    Args:
        row: a row with the fields that the template names (``context`` among them).
        dataset: the row's task; the raw tasks take no chat template. A LongBench-E suffix ``_e`` is ignored.
        template: LongBench's prompt format for the task.
        tokenizer: the model's tokenizer.
        spec: the model's prompt limit and whether it is a chat model.
        raw: no chat template whatever the dataset.
        answer_prefix: format of the answer's first words, put behind the chat template (not counted by the limit).
    """
    check_fields(template, row, dataset, answer_prefix)
    before, after = template.split(CONTEXT_FIELD)
    head = before.format(**row) + str(row["context"])
    tail = after.format(**row)
    head, tail, removed = _truncate_middle(head, tail, tokenizer, spec.max_length)
    if removed:
        check_template_fits(template, dataset, tokenizer, spec)
    chat = takes_chat(spec, dataset, raw)
    empty, prefix = {**row, "context": ""}, answer_prefix.format(**row)
    bare = _tokenise(before.format(**empty), after.format(**empty), tokenizer, chat, prefix)
    return dataclasses.replace(_tokenise(head, tail, tokenizer, chat, prefix), removed_tokens=removed, bare=bare)


def takes_chat(spec: ModelSpec, dataset: str, raw: bool = False) -> bool:
    """Whether a row is asked in a turn of the chat template."""
    return spec.chat_template and not raw and dataset.removesuffix("_e") not in RAW_TASKS


def prompt_tokens(
    row: Mapping[str, Any],
    dataset: str,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    spec: ModelSpec,
    *,
    raw: bool = False,
    answer_prefix: str = "",
) -> int:
    """Tokens that :func:`build_prompt` gives a row that is not cut."""
    check_fields(template, row, dataset, answer_prefix)
    before, after = template.split(CONTEXT_FIELD)
    chat = takes_chat(spec, dataset, raw)
    head = before.format(**row) + str(row["context"])
    return len(_tokenise(head, after.format(**row), tokenizer, chat, answer_prefix.format(**row)).ids)


def shared_prompts(
    row: Mapping[str, Any],
    questions: Sequence[str],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    spec: ModelSpec,
    *,
    raw: bool = False,
    reserve: int = 0,
) -> list[Prompt]:
    """Prompts of several questions on one context: all have the same ``context_ids``.

    A context that is too long is cut in the middle once, so that it fits with the longest of the questions.

    Args:
        row: its ``input`` is replaced by each question.
        questions: the questions.
        template: prompt format.
        tokenizer: the model's tokenizer.
        spec: the model's prompt limit and whether it is a chat model.
        raw: no chat template.
        reserve: tokens of the limit to leave free for later turns.

    Raises:
        ValueError: if the questions alone do not fit.
    """
    start, longest = check_questions_fit(row, questions, template, tokenizer, spec, reserve)
    limit = spec.max_length - reserve
    head, _, removed = _truncate_middle(start + str(row["context"]), longest, tokenizer, limit)
    cut = {**row, "context": head[len(start) :]}
    # The limit is met; text that is tokenised anew may have a token more than its parts, and must not be cut again.
    free = dataclasses.replace(spec, max_length=2 * spec.max_length)
    dataset = str(row.get("dataset", ""))
    found = [build_prompt({**cut, "input": q}, dataset, template, tokenizer, free, raw=raw) for q in questions]
    return [dataclasses.replace(prompt, removed_tokens=removed) for prompt in found]


def check_questions_fit(
    row: Mapping[str, Any],
    questions: Sequence[str],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    spec: ModelSpec,
    reserve: int,
) -> tuple[str, str]:
    """Returns the text before the context and the longest text behind it; see :func:`shared_prompts`.

    Raises:
        ValueError: where they, and what is reserved, leave no room for the context; names dataset and row.
    """
    dataset = row.get("dataset", "")
    check_fields(template, row, dataset)
    before, after = template.split(CONTEXT_FIELD)
    start = before.format(**row)
    tails = [after.format(**{**row, "input": question}) for question in questions]
    longest = max(tails, key=lambda tail: len(_encode(tail, tokenizer)))
    limit = spec.max_length - reserve
    if limit < 2 or len(_encode(start + longest, tokenizer)) > limit // 2:
        raise ValueError(
            f"prompt of {dataset}: the questions of row {row.get('_id')!r} leave no room for its context: prompt limit "
            f"{spec.max_length} tokens, {reserve} of them for later turns"
        )
    return start, longest


def follow_up(question: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> Prompt:
    """The next question of a conversation, as it follows the last token of an answer.

    Args:
        question: what the user says.
        tokenizer: the model's tokenizer.
        chat: whether the turns are those of its chat template; else empty lines are between them.
    """
    text = f"\n\n{question}"
    if chat:
        from asymkv.chat import chat_text

        around = chat_text(tokenizer)
        text = around.between + question + around.suffix
    return Prompt([], _encode_continuation(text, tokenizer), text)


def answer_ids(prompt: Prompt, answer: str, tokenizer: PreTrainedTokenizerBase, limit: int = 512) -> list[int]:
    """Returns the ids of a gold answer as the continuation of ``prompt``.

    A space joins the two where the prompt ends in a visible (ASCII) character, as in ``Type: Food``.

    Args:
        prompt: what the answer follows.
        answer: the text.
        tokenizer: the model's tokenizer.
        limit: the answer is cut after so many tokens.
    """
    last = prompt.question_text[-1:]
    joined = last.isascii() and last.strip() and answer[:1].strip()
    ids = _encode_continuation((" " if joined else "") + answer, tokenizer)
    return ids[:limit]


def check_template(template: Any, where: str) -> list[str]:
    """Returns the fields of a prompt format; ``{context}`` must be among them once.

    Args:
        template: a format string with plain ``{field}``s.
        where: begins the error: the file and the task.
    """
    if not isinstance(template, str):
        raise ValueError(f"{where}: a prompt template must be a string, found {type(template).__name__}")
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{where}: {error} in the prompt template {template!r}") from error
    names = [name for name, _, _ in parts]
    odd = [name for name, spec, conversion in parts if spec or conversion or not name.isidentifier()]
    if odd:
        raise ValueError(f"{where}: a prompt template takes plain {{field}}s, found {odd} in {template!r}")
    if names.count("context") != 1 or template.count(CONTEXT_FIELD) != 1:
        raise ValueError(f"{where}: a prompt template must contain {CONTEXT_FIELD} exactly once, got {template!r}")
    return names


def check_fields(template: str, row: Mapping[str, Any], dataset: str, answer_prefix: str = "") -> None:
    """Raises where the prompt of ``dataset``, or the answer's first words, name a field that ``row`` does not have."""
    prefix = [part[1] for part in string.Formatter().parse(answer_prefix) if part[1] is not None]
    absent = [name for name in [*check_template(template, f"prompt of {dataset}"), *prefix] if name not in row]
    if absent:
        raise ValueError(
            f"prompt of {dataset}: row {row.get('_id')!r} has no field {', '.join(map(repr, absent))}; "
            f"it has {', '.join(row)}"
        )


def check_template_fits(template: str, dataset: str, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> None:
    """Raises where the model's prompt limit leaves no token for the row besides the template's own words."""
    words = template.format_map(dict.fromkeys(check_template(template, f"prompt of {dataset}"), ""))
    tokens = len(_encode(words, tokenizer)) + tokenizer.num_special_tokens_to_add()
    if tokens >= spec.max_length:
        raise ValueError(
            f"prompt of {dataset}: the template alone has {tokens} tokens, the limit of {spec.name} is "
            f"{spec.max_length} (--max-length); nothing of a row would be read"
        )


def _truncate_middle(head: str, tail: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[str, str, int]:
    """Keeps the first and the last ``limit // 2`` tokens of the prompt, and its whole question side where that fits.

    Special tokens that the tokenizer adds count towards the limit, as in LongBench. The text is sliced at token
    boundaries and not decoded from ids, which would break characters that span the cut.
    """
    spans = tokenizer(head + tail, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = spans["offset_mapping"]
    specials = tokenizer.num_special_tokens_to_add()
    if len(spans) + specials <= limit:
        return head, tail, 0
    front, back = limit // 2 - specials, limit // 2
    question = sum(1 for start, _ in spans if start >= len(head))
    if back < question < limit - specials:
        front, back = limit - specials - question, question
    end = spans[front - 1][1]
    # The tokens of one multi-byte character share its span; max() keeps the character from appearing twice.
    start = max(end, spans[-back][0])
    tail = tail[: max(end - len(head), 0)] + tail[max(start - len(head), 0) :]
    return head[:end] + head[start:], tail, len(spans) - front - back


def _tokenise(head: str, tail: str, tokenizer: PreTrainedTokenizerBase, chat: bool, prefix: str = "") -> Prompt:
    """Applies the chat template (if any) and tokenises the two sides apart."""
    if chat:
        head, tail = _wrap_chat(head, tail, tokenizer)
    elif prefix and tail[-1:].strip():
        tail += "\n"
    tail += prefix
    context_ids = _encode(head, tokenizer)
    bos = tokenizer.bos_token_id
    if _adds_bos(tokenizer) and context_ids[:1] != [bos]:
        context_ids = [bos, *context_ids]
    return Prompt(context_ids, _encode_continuation(tail, tokenizer), tail)


def _wrap_chat(head: str, tail: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Renders one user turn and returns the text before and after the end of the context."""
    text = head + tail
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    start = rendered.rfind(text)
    if start >= 0:
        cut = start + len(head)
        return rendered[:cut], rendered[cut:]
    # Some chat templates strip the message.
    body = text.strip()
    start = rendered.rfind(body)
    if start < 0:
        raise ValueError("the chat template changes the message's text; the end of the context cannot be located")
    stripped = len(text) - len(text.lstrip())
    cut = start + min(max(len(head) - stripped, 0), len(body))
    return rendered[:cut], rendered[cut:]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _encode_continuation(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenises text that follows other text.

    SentencePiece tokenizers put a space before whatever they are given. Behind an anchor that takes this space, the
    text is tokenised as the continuation that it is.
    """
    anchor = _encode("\n", tokenizer)
    if not anchor or not tokenizer.convert_ids_to_tokens(anchor)[0].startswith("▁"):
        return _encode(text, tokenizer)
    ids = _encode("\n" + text, tokenizer)
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else _encode(text, tokenizer)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with BOS (Llama, Mistral) or not (Qwen2, SmolLM2)."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]
