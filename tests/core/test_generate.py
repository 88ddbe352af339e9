"""Plain ``generate`` on a compressed cache, in every way that users call it."""

import pytest
import torch
from tiny_models import FAMILIES, assert_same_rows, left_padded, prompt, tiny_model, tiny_tokenizer
from transformers import pipeline

import asymkv
from asymkv.ops import extension

CPU_BACKEND = "cpp" if extension.loaded() else "sdpa"
SMALL = {"budget": 48, "chunk_size": 32, "decode_interval": 8}


def generate(model, ids, **kwargs):
    return model.generate(ids, **{"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, **kwargs})


def test_long_prompt_greedy_stays_within_budget():
    model = tiny_model()
    with asymkv.replace("llama", **SMALL):
        cache = generate(model, prompt(700)).past_key_values
    stats = cache.stats()
    assert cache.num_rows(0).max() <= 48 + 8 and stats["peak_rows"] <= 48 + 32
    assert stats["kept_ratio"] < 0.1 and stats["tokens_seen"] == [719] and stats["backend"] == CPU_BACKEND


@pytest.mark.parametrize("size", [1, 16, 45, 1000])
def test_hf_chunking_of_the_prefill(size):
    """generate's own prefill_chunk_size only makes chunks smaller; a ratio still means the whole prompt."""
    model = tiny_model()
    with asymkv.replace("llama", ratio=0.3, chunk_size=32):
        cache = generate(model, prompt(300), prefill_chunk_size=size, max_new_tokens=1).past_key_values
        assert cache.num_rows(0).tolist() == [[90, 90]] and cache.tokens_seen.tolist() == [300]
        if size == 1000:
            assert_same_rows(cache, model(prompt(300)).past_key_values)


def test_hf_chunking_of_a_padded_batch_equals_rows_alone():
    model = tiny_model(dtype=torch.float64)
    ids, mask, alone = left_padded([130, 37])
    with asymkv.replace("llama", ratio=0.5, chunk_size=32, sink_size=2, window_size=4):
        both = generate(model, ids, attention_mask=mask, prefill_chunk_size=1000, max_new_tokens=4)
        for row in range(2):
            one = generate(model, alone[row], max_new_tokens=4)
            assert torch.equal(one.sequences[0, -4:], both.sequences[row, -4:])
            assert_same_rows(one.past_key_values, both.past_key_values, row_b=row, rtol=1e-6)
        sliced = generate(model, ids, attention_mask=mask, prefill_chunk_size=10, max_new_tokens=4).past_key_values
        assert sliced.num_rows(0).tolist() == [[65 + 3] * 2, [18 + 3] * 2]


def test_a_streamer_is_given_every_token():
    """The prompt, then tokens one by one, as they are generated on the compressed cache."""

    class Streamer:
        def __init__(self):
            self.given, self.ended = [], False

        def put(self, value):
            self.given.append(value.flatten())

        def end(self):
            self.ended = True

    streamer, model = Streamer(), tiny_model()
    with asymkv.replace("llama", budget=64, chunk_size=64, model=model):
        out = generate(model, prompt(200), max_new_tokens=6, streamer=streamer)
    assert streamer.ended and [len(each) for each in streamer.given] == [200, *[1] * 6]
    assert torch.equal(torch.cat(streamer.given), out.sequences[0])
    assert int(out.past_key_values.num_rows(0).max()) < 200


def test_beam_search_reorders_rows():
    """Three beams of a full-budget cache are stock's three beams; and a compressed one runs."""
    model = tiny_model()
    ref = model.generate(prompt(40, batch=2), num_beams=3, max_new_tokens=10, do_sample=False)
    with asymkv.replace("llama", budget=400):
        assert torch.equal(model.generate(prompt(40, batch=2), num_beams=3, max_new_tokens=10, do_sample=False), ref)
    with asymkv.replace("llama", **SMALL):
        cache = generate(model, prompt(100, batch=2), num_beams=3).past_key_values
        assert cache.num_rows(1).shape == (6, 2) and cache.num_rows(1).max() <= 56


def test_sampling_follows_the_seed():
    model = tiny_model()
    with asymkv.replace("llama", **SMALL):
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(generate(model, prompt(90), do_sample=True, top_k=20, num_return_sequences=2).sequences)
    assert torch.equal(*runs) and not torch.equal(runs[0][0], runs[0][1])


@pytest.mark.parametrize("method", ["asymkv", "h2o", "streaming_llm", "full"])
def test_second_turn_on_the_same_cache(method):
    """The whole conversation is passed again; only the new part is fed, and compressed like any prompt."""
    model = tiny_model()
    with asymkv.replace("llama", **{**SMALL, "method": method, "chunk_size": None if method == "full" else 32}):
        first = generate(model, prompt(150))
        cache = first.past_key_values
        talk = torch.cat([first.sequences, prompt(60, seed=8)], 1)
        second = generate(model, talk, past_key_values=cache, max_new_tokens=5)
        assert second.past_key_values is cache and cache.tokens_seen.tolist() == [150 + 20 + 60 + 4]
        assert cache.get_seq_length() == 234
        if method != "full":
            assert (cache.num_rows(0) == 48 + 4).all() and cache.peak_rows <= 80
        else:
            fresh = generate(model, talk, max_new_tokens=5)
            assert torch.equal(fresh.sequences, second.sequences)


def test_fork_asks_many_questions_on_one_context():
    model = tiny_model()
    with asymkv.replace("llama", **SMALL):
        cache = model(prompt(200)).past_key_values
        before = [k.clone() for k in cache.keys(1)[0]]
        answers = []
        for _ in range(2):
            out = generate(model, torch.cat([prompt(200), prompt(9, seed=4)], 1), past_key_values=cache.fork())
            answers.append(out.sequences)
        assert torch.equal(*answers)
        assert cache.tokens_seen.tolist() == [200] and all(map(torch.equal, before, cache.keys(1)[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes(family, dtype):
    model = tiny_model(family, dtype=dtype)
    with asymkv.replace(family, **SMALL, curvature="loss"):
        cache = generate(model, prompt(120, batch=2), max_new_tokens=12).past_key_values
    assert cache.keys(0)[0][0].dtype == dtype
    assert all(torch.isfinite(k).all() for rows in cache.keys(1) for k in rows)


def test_autocast():
    model = tiny_model()
    with asymkv.replace("llama", **SMALL), torch.autocast("cpu", torch.bfloat16):
        assert generate(model, prompt(90)).past_key_values.keys(0)[0][0].dtype == torch.bfloat16


def test_device_map():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(tiny_model(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    plain = tiny_model()
    with asymkv.replace("llama", model=model, **SMALL):
        out = generate(model, prompt(120)).sequences
    with asymkv.replace("llama", model=plain, **SMALL):
        assert torch.equal(generate(plain, prompt(120)).sequences, out)


def test_pipeline_batches_prompts_of_unequal_length():
    model = tiny_model()
    texts = [" ".join(f"w{(7 * i + n) % 100}" for i in range(n)) for n in (90, 140)]
    with asymkv.replace("llama", **SMALL):
        pipe = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
        together = pipe(texts, batch_size=2, max_new_tokens=6, do_sample=False, return_full_text=False)
        alone = [pipe([t], max_new_tokens=6, do_sample=False, return_full_text=False)[0] for t in texts]
    assert [t[0]["generated_text"] for t in together] == [a[0]["generated_text"] for a in alone]


def test_prompt_of_one_token():
    model = tiny_model()
    ref = model.generate(prompt(1), max_new_tokens=5, do_sample=False)
    with asymkv.replace("llama", **SMALL):
        out = generate(model, prompt(1), max_new_tokens=5)
    assert torch.equal(out.sequences, ref) and out.past_key_values.tokens_seen.tolist() == [5]


def test_assisted_generation():
    model, assistant = tiny_model(), tiny_model(seed=0)
    ref = model.generate(prompt(40), max_new_tokens=12, do_sample=False)
    with asymkv.replace("llama", model=model, method="full"):
        out = model.generate(prompt(40), max_new_tokens=12, do_sample=False, assistant_model=assistant)
        assert torch.equal(out, ref)
    with asymkv.replace("llama", model=model, **SMALL), pytest.raises(ValueError, match="method='full'"):
        model.generate(prompt(40), max_new_tokens=12, do_sample=False, assistant_model=assistant)


def test_cache_implementation_conflicts_loudly():
    with asymkv.replace("llama", **SMALL), pytest.raises(ValueError, match="cache_implementation='static'"):
        tiny_model().generate(prompt(40), max_new_tokens=2, cache_implementation="static")
