"""Bad input gets a clear error at once, or the right result; nothing is silently wrong."""

import pytest
import torch
from tiny_models import left_padded, prompt, tiny_model

import asymkv

SMALL = {"budget": 48, "chunk_size": 32}


@pytest.fixture
def model():
    model = tiny_model()
    with asymkv.replace("llama", model=model, **SMALL):
        yield model


def test_empty_prompt(model):
    with pytest.raises(ValueError, match="empty prompt"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)


def test_rows_of_padding_are_named(model):
    ids, mask, _ = left_padded([60, 40])
    mask[1] = 0
    with pytest.raises(ValueError, match=r"rows \[1\] of the batch hold nothing but padding"):
        model(ids, attention_mask=mask)
    for chunk in (None, 16):
        with pytest.raises(ValueError, match=r"rows \[1\]"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=chunk)


def test_masks_that_do_not_fit(model):
    with pytest.raises(ValueError, match=r"must be 2D, \[1, 60\].*found \(1, 1, 60, 60\)"):
        model(prompt(60), attention_mask=torch.ones(1, 1, 60, 60))
    cache = model(prompt(60)).past_key_values
    with pytest.raises(ValueError, match=r"columns seen before, 60, and new, 2"):
        model(prompt(2), attention_mask=torch.ones(1, 2), past_key_values=cache)


def test_foreign_positions_are_refused(model):
    own = torch.arange(60)[None]
    assert torch.equal(model(prompt(60), position_ids=own).logits, model(prompt(60)).logits)
    with pytest.raises(ValueError, match="position_ids must count"):
        model(prompt(60), position_ids=own + 1)
    with pytest.raises(ValueError, match="packed"):
        model(prompt(60), position_ids=torch.cat([own[:, :30], own[:, :30]], 1))


def test_both_or_neither_input(model):
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=prompt(5), inputs_embeds=torch.zeros(1, 5, 64))
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_training_is_refused_and_possible_without_cache(model):
    model.train()
    with pytest.raises(ValueError, match="use_cache=False to train"):
        model(prompt(20), labels=prompt(20))
    model(prompt(20), labels=prompt(20), use_cache=False).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_a_failed_forward_names_its_cause_and_the_next_one_works(model):
    hook = model.model.layers[1].register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(prompt(60))
    hook.remove()
    assert model(prompt(60)).past_key_values.num_rows(0).max() == 48


def test_a_cache_left_by_an_interrupted_forward_is_refused(model):
    """Its first layer holds the tokens and its second does not: going on would lose them without a word."""
    cache = model(prompt(60)).past_key_values
    before = cache.fork()
    hook = model.model.layers[1].register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(prompt(3), past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="interrupted"):
        model(prompt(1), past_key_values=cache)
    assert model(prompt(3), past_key_values=before).past_key_values.tokens_seen.tolist() == [63]
    cache.reset()
    assert model(prompt(60), past_key_values=cache).past_key_values.tokens_seen.tolist() == [60]


def test_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("ASYMKV_BACKEND", "tpu")
    model = tiny_model()
    with asymkv.replace("llama", model=model), pytest.raises(ValueError, match="unknown backend 'tpu'"):
        model(prompt(20))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_backends_agree_on_a_whole_run(backend):
    model = tiny_model(dtype=torch.float64)
    with asymkv.replace("llama", model=model, **SMALL, backend=backend):
        out = model(prompt(150))
        assert out.past_key_values.stats()["backend"] == backend
    with asymkv.replace("llama", model=model, **SMALL, backend="reference"):
        assert torch.allclose(out.logits, model(prompt(150)).logits, atol=1e-8)
