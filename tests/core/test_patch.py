"""The patch: reversible, visible, loud, and inert on caches that the user passes."""

import copy
import functools
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from tiny_models import FAMILIES, prompt, tiny_model
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

import asymkv
from asymkv.models import get_adapter

REPLACE = {f: getattr(asymkv, f"replace_{f}_asymkv") for f in FAMILIES}


def test_every_family_has_its_function_with_one_signature():
    assert len({str(inspect.signature(f)) for f in REPLACE.values()}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_returns_the_same_function_objects(family):
    adapter = get_adapter(family)
    lm, attention = adapter.causal_lm_class(), adapter.attention_class()
    before = [lm.forward, attention.forward, lm._prepare_cache_for_generation, lm.extra_repr]
    had = "_prepare_cache_for_generation" in vars(lm)
    handle = REPLACE[family]()
    assert lm.forward is not before[0] and attention.forward is not before[1]
    handle.restore()
    assert [lm.forward, attention.forward, lm._prepare_cache_for_generation, lm.extra_repr] == before
    assert ("_prepare_cache_for_generation" in vars(lm)) == had
    handle.restore()  # harmless


@pytest.mark.parametrize("family", FAMILIES)
def test_instance_patch_leaves_other_instances_alone(family):
    model, other = tiny_model(family), tiny_model(family)
    with REPLACE[family](model=model):
        assert isinstance(model(prompt(8)).past_key_values, asymkv.CompressedCache)
        assert isinstance(other(prompt(8)).past_key_values, DynamicCache)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("instance", [True, False])
@pytest.mark.parametrize("cache", ["empty", "filled", "static"])
def test_user_cache_runs_the_original_code_bit_for_bit(family, instance, cache):
    def fresh(model):
        if cache == "static":
            return StaticCache(config=model.config, max_cache_len=64)
        past = DynamicCache(config=model.config)
        if cache == "filled":
            model(prompt(5, seed=9), past_key_values=past)
        return past

    model = tiny_model(family)
    ref = model(prompt(20), past_key_values=fresh(model)).logits
    filled = fresh(model)
    with REPLACE[family](budget=37, model=model if instance else None):
        out = model(prompt(20), past_key_values=filled)
        assert torch.equal(out.logits, ref) and out.past_key_values is filled


def test_generate_with_a_user_cache_is_stock():
    model = tiny_model()
    ref = model.generate(prompt(60), max_new_tokens=8, do_sample=False)
    with asymkv.replace_llama_asymkv(budget=40):
        out = model.generate(prompt(60), max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
                             past_key_values=DynamicCache(config=model.config))  # fmt: skip
    assert torch.equal(out.sequences, ref) and type(out.past_key_values) is DynamicCache


def test_without_cache_runs_stock():
    model = tiny_model()
    ref = model(prompt(60), use_cache=False).logits
    with asymkv.replace_llama_asymkv(budget=40):
        out = model(prompt(60), use_cache=False)
        assert torch.equal(out.logits, ref) and out.past_key_values is None
        assert isinstance(model.model(prompt(60)).past_key_values, DynamicCache)
        model.config.use_cache = False
        assert model(prompt(60)).past_key_values is None


def test_attentions_come_from_stock_or_not_at_all():
    model = tiny_model(attn_implementation="eager")
    with asymkv.replace_llama_asymkv(budget=40):
        out = model(prompt(50), output_attentions=True)
        assert out.attentions[0].shape == (1, 4, 50, 50) and out.past_key_values is None
        cache = model(prompt(50)).past_key_values
        with pytest.raises(ValueError, match="use_cache=False"):
            model(prompt(50), output_attentions=True, use_cache=True)
        with pytest.raises(ValueError, match="output_attentions"):
            model(prompt(1), past_key_values=cache, output_attentions=True)


@pytest.mark.parametrize("instance", [True, False])
def test_patching_twice_raises_and_a_second_patch_works_after_restore(instance):
    model = tiny_model()
    target = {"model": model} if instance else {}
    handle = asymkv.replace_llama_asymkv(**target)
    with pytest.raises(ValueError, match="patched already"):
        asymkv.replace_llama_asymkv(**target)
    handle.restore()
    asymkv.replace_llama_asymkv(**target).restore()


def test_print_names_the_method():
    model = tiny_model()
    plain = repr(model)
    with asymkv.replace_llama_asymkv(method="h2o", budget=99):
        assert "asymkv: method=h2o, budget=99" in repr(model)
    assert repr(model) == plain


def test_restore_without_handle_undoes_everything():
    asymkv.replace_llama_asymkv()
    asymkv.replace("qwen2", model=tiny_model("qwen2"))
    asymkv.restore()  # the fixture checks


def test_unknown_family_and_foreign_model_list_the_choices():
    with pytest.raises(ValueError, match=r"opt.*'gpt2', 'llama', 'mistral', 'qwen2'"):
        asymkv.replace("opt")
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    with pytest.raises(ValueError, match="found GPT2LMHeadModel, expected 'llama'"):
        asymkv.replace_llama_asymkv(model=model)


def test_unpatched_model_refuses_a_compressed_cache():
    model = tiny_model()
    with asymkv.replace_llama_asymkv():
        cache = model(prompt(9)).past_key_values
    with pytest.raises(ValueError, match="not patched"):
        model(prompt(2), past_key_values=cache)
    with pytest.raises(ValueError, match="not patched"):
        model.generate(prompt(12), past_key_values=cache, max_new_tokens=2)


def test_decoder_alone_refuses_a_compressed_cache():
    model = tiny_model()
    with asymkv.replace_llama_asymkv():
        cache = model(prompt(9)).past_key_values
        with pytest.raises(ValueError, match="call the LM"):
            model.model(prompt(2), past_key_values=cache)


@pytest.mark.parametrize(("family", "overrides"), [("mistral", {"sliding_window": 16}),
                                                   ("qwen2", {"use_sliding_window": True, "sliding_window": 16,
                                                              "max_window_layers": 1})])  # fmt: skip
def test_sliding_window_models_are_refused(family, overrides):
    model = tiny_model(family, **overrides)
    with pytest.raises(ValueError, match="full attention"):
        REPLACE[family](model=model)
    with REPLACE[family](), pytest.raises(ValueError, match="full attention"):
        model.generate(prompt(9), max_new_tokens=1)


def hooked_model():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def test_class_patch_under_hooked_instances_raises():
    model = hooked_model()
    with pytest.raises(ValueError, match="hooked by accelerate"):
        asymkv.replace_llama_asymkv()
    with asymkv.replace_llama_asymkv(model=model, budget=40):
        cache = model.generate(prompt(80), max_new_tokens=2, return_dict_in_generate=True).past_key_values
        assert cache.num_rows(0).max() <= 42
    assert isinstance(model(prompt(8)).past_key_values, DynamicCache)


def test_a_forward_captured_by_accelerate_delegates_after_restore():
    ref = tiny_model()(prompt(50)).logits
    handle = asymkv.replace_llama_asymkv(budget=40)
    model = hooked_model()
    assert model(prompt(50)).past_key_values.num_rows(1).max() == 40
    handle.restore()
    out = model(prompt(50))
    assert torch.equal(out.logits, ref) and isinstance(out.past_key_values, DynamicCache)


def test_nothing_is_written_to_the_model_config():
    model = tiny_model()
    before = model.config.to_dict()
    with asymkv.replace_llama_asymkv(budget=40):
        model.generate(prompt(80), max_new_tokens=3)
    assert model.config.to_dict() == before


def test_a_deep_copy_of_a_patched_instance_runs_on_its_own_weights():
    model, ids = tiny_model(), prompt(60)
    with asymkv.replace_llama_asymkv(model=model, budget=48):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(0.5)
            assert not torch.equal(other(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
            cache = DynamicCache()
            assert torch.equal(other(ids, past_key_values=cache).logits, other(ids, use_cache=False).logits)
            assert isinstance(other(ids).past_key_values, asymkv.CompressedCache)
    fresh = tiny_model()
    fresh.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(other(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize("by", ["class", "instance"])
def test_a_subclass_that_hands_all_on_is_served(by):
    base = get_adapter("llama").causal_lm_class()

    class HandsOn(base):
        def forward(self, *args, **more):
            return super().forward(*args, **more)

    model = HandsOn(tiny_model().config).eval()
    with asymkv.replace_llama_asymkv(budget=48, **({"model": model} if by == "instance" else {})), torch.no_grad():
        first, second = model(prompt(60)), model(input_ids=prompt(60), logits_to_keep=1)
        assert first.past_key_values.max_rows() == second.past_key_values.max_rows() == 48
        assert (first.logits.shape[1], second.logits.shape[1]) == (60, 1)


@pytest.mark.parametrize(("family", "overrides"), [("mistral", {}), ("qwen2", {"use_sliding_window": True,
                                                                               "max_window_layers": 1})])  # fmt: skip
def test_a_sliding_window_is_served_up_to_its_end(family, overrides):
    """Until then its attention is full attention; a row's own tokens count, not its padding."""
    model, ids = tiny_model(family, sliding_window=64, **overrides), prompt(60, batch=2)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    ref = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False)
    with REPLACE[family](model=model, method="full"):
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False), ref)
    with REPLACE[family](model=model, budget=48):
        with pytest.raises(ValueError, match="sliding_window=64 cannot be passed.*found a sequence of 65 tokens"):
            model.generate(ids, max_new_tokens=6)
        cache = model(ids).past_key_values
        assert cache.max_rows() == 48
        with pytest.raises(ValueError, match="a sequence of 65 tokens"):
            model(prompt(5, batch=2), past_key_values=cache)
        assert model(prompt(4, batch=2), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("wrap", [
    functools.partial, lambda f: functools.wraps(f)(lambda *args, **kwargs: f(*args, **kwargs)),
    lambda f: torch.compile(f, backend="eager", disable=True),
], ids=["partial", "wraps", "compile"])  # fmt: skip
def test_an_instance_whose_forward_was_replaced_is_served(wrap):
    model = tiny_model()
    model.forward = wrap(model.forward)
    with asymkv.replace_llama_asymkv(budget=48, model=model), torch.no_grad():
        assert model(prompt(60)).past_key_values.max_rows() == 48
        assert model(input_ids=prompt(60), logits_to_keep=1).logits.shape[1] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_instance_patch_keeps_the_signature_that_trainer_and_peft_read(family):
    model = tiny_model(family)
    stock = inspect.signature(model.forward)
    with REPLACE[family](model=model):
        assert inspect.signature(model.forward) == stock and "input_ids" in stock.parameters


def test_prompt_tuning_generates_on_the_patch():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(), prompt(40)
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    stock = tuned.generate(input_ids=ids, max_new_tokens=8, eos_token_id=None)
    with asymkv.replace_llama_asymkv(model=model, method="full") as patch:
        assert torch.equal(tuned.generate(input_ids=ids, max_new_tokens=8, eos_token_id=None), stock)
        cache = patch.new_cache(model)
        tuned.generate(input_ids=ids, max_new_tokens=8, eos_token_id=None, past_key_values=cache)
    assert cache.tokens_seen.tolist() == [4 + 40 + 7]


def test_prefix_tuning_which_brings_a_cache_of_its_own_is_refused():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with asymkv.replace_llama_asymkv(model=model), pytest.raises(AttributeError, match="PEFT's prefix tuning"):
        tuned.generate(input_ids=prompt(40), max_new_tokens=8)


@pytest.mark.parametrize("dump", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "save"])
def test_a_model_patched_alone_is_not_pickled_into_one_that_is_not(dump):
    model = tiny_model()
    with asymkv.replace_llama_asymkv(model=model), pytest.raises(TypeError, match=r"cannot be pickled.*restore\(\)"):
        dump(model)
    assert isinstance(pickle.loads(pickle.dumps(model))(prompt(8)).past_key_values, DynamicCache)


def test_a_model_patched_alone_goes_with_its_last_reference():
    model = tiny_model()
    asymkv.replace_llama_asymkv(model=model, budget=48)
    model(prompt(60))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("own", ["patched", "copied", "wrapped"])
def test_class_patch_under_instances_with_a_forward_of_their_own_raises(own):
    model, why = tiny_model(), r"patched with model=\.\.\."
    if own == "wrapped":
        model.forward, why = functools.partial(model.forward), "given a forward of its own"
    else:
        handle = asymkv.replace_llama_asymkv(model=model)
        if own == "copied":
            other = copy.deepcopy(model)
            handle.restore()
            model = other
    with pytest.raises(ValueError, match=why):
        asymkv.replace_llama_asymkv()
    asymkv.restore()


def test_continuous_batching_is_refused_and_comes_back_with_restore(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model), "init_continuous_batching", lambda self, *args, **more: "stock")
    for target in ({}, {"model": model}):
        with asymkv.replace_llama_asymkv(**target), pytest.raises(ValueError, match="continuous batching"):
            model.generate_batch([[1, 2, 3]])
        assert model.init_continuous_batching() == "stock"


@pytest.mark.parametrize(("given", "match"), [
    (lambda model: asymkv.replace_llama_asymkv(model), r"found LlamaForCausalLM; pass a model as model="),
    (lambda model: asymkv.replace_llama_asymkv({"budget": 5}), "found dict"),
    (lambda model: asymkv.replace_llama_asymkv(model="llama"), "a live LlamaForCausalLM.*found 'llama'"),
    (lambda model: asymkv.replace_llama_asymkv(model=type(model)), "a live LlamaForCausalLM"),
])  # fmt: skip
def test_arguments_of_another_kind_are_named(given, match):
    with pytest.raises(TypeError, match=match):
        given(tiny_model())
