"""Prompts: where the two sides meet, what truncation leaves, who gets a chat template, and how many BOS there are."""

from __future__ import annotations

import dataclasses

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asymkv.longbench.models import ModelSpec
from asymkv.longbench.prompts import RAW_TASKS, answer_ids, build_prompt

TEMPLATE = "Read.\n{context}\nQ: {input}\nA:"
ROW = {"context": "The sky is blue.", "input": "Which colour?", "answers": ["blue"]}


def test_the_sides_meet_after_the_context(tokenizer, spec: ModelSpec) -> None:
    prompt = build_prompt(ROW, "qasper", TEMPLATE, tokenizer, spec)
    assert tokenizer.decode(prompt.context_ids) == "<|user|>Read.\nThe sky is blue."
    assert tokenizer.decode(prompt.question_ids) == "\nQ: Which colour?\nA:</s><|assistant|>"
    assert prompt.ids == prompt.context_ids + prompt.question_ids


@pytest.mark.parametrize("dataset", sorted(RAW_TASKS))
def test_raw_tasks_get_no_chat_template(dataset: str, tokenizer, spec: ModelSpec) -> None:
    prompt = build_prompt(ROW, dataset, TEMPLATE, tokenizer, spec)
    assert tokenizer.decode(prompt.ids) == TEMPLATE.format(**ROW)


def test_a_model_without_chat_gets_no_template(tokenizer, spec: ModelSpec) -> None:
    prompt = build_prompt(ROW, "qasper", TEMPLATE, tokenizer, dataclasses.replace(spec, chat_template=False))
    assert tokenizer.decode(prompt.ids) == TEMPLATE.format(**ROW)


@pytest.mark.parametrize("dataset", ["qasper", "trec"])
@pytest.mark.parametrize("template_writes_bos", [False, True])
def test_there_is_one_bos_where_the_tokenizer_adds_one(
    template_writes_bos: bool, dataset: str, make_tokenizer, spec: ModelSpec
) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.chat_template = "<s>" * template_writes_bos + tokenizer.chat_template
    ids = build_prompt(ROW, dataset, TEMPLATE, tokenizer, spec).ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_there_is_no_bos_where_the_tokenizer_adds_none(tokenizer, spec: ModelSpec) -> None:
    assert tokenizer.bos_token_id not in build_prompt(ROW, "trec", TEMPLATE, tokenizer, spec).ids


def test_without_context_is_the_same_template_with_an_empty_context(tokenizer, spec: ModelSpec) -> None:
    bare = build_prompt(ROW, "qasper", TEMPLATE, tokenizer, spec).without_context()
    assert tokenizer.decode(bare.ids) == "<|user|>Read.\n\nQ: Which colour?\nA:</s><|assistant|>"
    assert tokenizer.decode(bare.context_ids) == "<|user|>Read.\n"
    assert bare.without_context() is bare


@pytest.mark.parametrize("adds_bos", [False, True])
def test_truncation_keeps_both_ends_and_the_question(adds_bos: bool, make_tokenizer) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    row = {"context": "a" * 100 + "m" * 100 + "z" * 100, "input": "?"}
    prompt = build_prompt(row, "trec", "{context}|{input}", tokenizer, ModelSpec("tiny", "tiny", max_length=60))
    text = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    # BOS counts as one of the first half, as in LongBench
    assert text == "a" * (30 - adds_bos) + "z" * 28 + "|?"
    assert len(prompt.ids) == 60 and tokenizer.decode(prompt.question_ids) == "|?"
    assert prompt.removed_tokens == 302 + adds_bos - 60


def test_a_prompt_at_the_limit_is_whole(tokenizer) -> None:
    row = {"context": "c" * 58, "input": "?"}
    prompt = build_prompt(row, "trec", "{context}|{input}", tokenizer, ModelSpec("tiny", "tiny", max_length=60))
    assert prompt.removed_tokens == 0 and len(prompt.ids) == 60


def test_a_question_longer_than_half_the_limit_survives_whole(tokenizer) -> None:
    row = {"context": "c" * 100, "input": "q" * 40}
    prompt = build_prompt(row, "trec", "{context}|{input}", tokenizer, ModelSpec("tiny", "tiny", max_length=60))
    assert tokenizer.decode(prompt.question_ids) == "|" + "q" * 40
    assert tokenizer.decode(prompt.context_ids) == "c" * 19


def test_a_question_longer_than_the_limit_is_cut_like_any_text(tokenizer) -> None:
    row = {"context": "c" * 10, "input": "q" * 100}
    prompt = build_prompt(row, "trec", "{context}|{input}", tokenizer, ModelSpec("tiny", "tiny", max_length=60))
    assert tokenizer.decode(prompt.ids) == "c" * 10 + "|" + "q" * 49


def test_a_cut_inside_a_character_leaves_whole_characters(tokenizer) -> None:
    row = {"context": "\u5317" * 60, "input": ""}
    prompt = build_prompt(row, "trec", "{context}{input}", tokenizer, ModelSpec("tiny", "tiny", max_length=80))
    assert set(tokenizer.decode(prompt.ids)) == {"\u5317"}


@pytest.mark.parametrize("template", ["  {context}\n\n{input}  ", "{context}\n \n"], ids=["padded", "nothing_after"])
def test_a_stripping_chat_template_does_not_move_the_split(template: str, tokenizer, spec: ModelSpec) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    prompt = build_prompt(ROW, "qasper", template, tokenizer, spec)
    assert tokenizer.decode(prompt.context_ids) == "<|user|>The sky is blue."
    assert tokenizer.decode(prompt.question_ids).endswith("</s><|assistant|>")


def test_a_template_without_context_is_refused(tokenizer, spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        build_prompt(ROW, "qasper", "Q: {input}", tokenizer, spec)


def test_answers_continue_the_prompt(tokenizer, spec: ModelSpec) -> None:
    raw = build_prompt(ROW, "trec", TEMPLATE, tokenizer, spec)
    line = build_prompt(ROW, "lcc", "{context}\n", tokenizer, spec)
    assert tokenizer.decode(answer_ids(raw, "blue", tokenizer)) == " blue"
    assert tokenizer.decode(answer_ids(line, "    x", tokenizer)) == "    x"
    assert len(answer_ids(raw, "blue" * 100, tokenizer, limit=7)) == 7


def test_a_question_gets_no_dummy_space_from_sentencepiece_tokenizers(spec: ModelSpec) -> None:
    vocab = {char: index for index, char in enumerate(sorted(set(TEMPLATE + str(ROW)) | {"\u2581", "<", "|", ">"}))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    prompt = build_prompt(ROW, "trec", TEMPLATE, tokenizer, spec)
    whole = tokenizer(TEMPLATE.format(**ROW), add_special_tokens=False)["input_ids"]
    assert prompt.ids == whole
