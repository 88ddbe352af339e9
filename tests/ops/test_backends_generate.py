"""GPU backends through plain generate: Triton in its interpreter or on a GPU, FlashAttention by a PyTorch stand-in."""

import copy

import pytest
import torch
from ragged import plain_varlen
from tiny_models import assert_close, left_padded, prompt, tiny_model

import asymkv
from asymkv.ops import backends

HEAD_DIM = 64  # the least that Triton's kernels serve
SETTINGS = {"budget": 24, "chunk_size": 16, "sink_size": 2, "window_size": 4, "decode_interval": 4}


@pytest.fixture(scope="module")
def model():
    return tiny_model(head_dim=HEAD_DIM, hidden_size=48, intermediate_size=64)


def generate(model, ids, mask, backend, **settings):
    """Tokens, logits of every step and the cache; on the model's device, but for the cache read on the CPU."""
    ids, mask = (None if x is None else x.to(model.device) for x in (ids, mask))
    with asymkv.replace("llama", **{**SETTINGS, **settings, "backend": backend}):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=10, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    assert out.past_key_values.stats()["backend"] == backend
    return out.sequences.cpu(), torch.stack(out.logits).cpu(), out.past_key_values


def check(model, ids, mask, backend, device="cpu", **settings):
    want = generate(model, ids, mask, "reference", **settings)
    on_device = model if str(device) == "cpu" else copy.deepcopy(model).to(device)
    have = generate(on_device, ids, mask, backend, **settings)
    assert torch.equal(want[0], have[0])
    assert_close("logits", want[1], have[1], 2e-5)
    for layer in range(2):
        assert torch.equal(want[2].num_rows(layer).cpu(), have[2].num_rows(layer).cpu())
    return have[2]


BATCHES = {"alone": (prompt(50), None), "padded": left_padded([50, 21])[:2]}


@pytest.mark.parametrize("batch", BATCHES)
def test_triton_generates_as_the_reference_does(model, batch, device, monkeypatch):
    """A prompt of four chunks, all but the first on a compressed cache, then decode through two compactions."""
    calls = []
    attend = backends.triton_attention.attend
    monkeypatch.setattr(backends.triton_attention, "attend", lambda *a: calls.append(a[0].shape[2]) or attend(*a))
    cache = check(model, *BATCHES[batch], "triton", device)
    assert {1, 16} <= set(calls), "decode and chunks both ran in Triton"
    assert cache.compactions >= 4 and cache.stats()["represented_tokens"] > 0


WHOLE = {"method": "snapkv", "chunk_size": None}
ADAPTIVE = {"head_budgets": "adaptive"}
# A minute each in the interpreter, which adds nothing to what runs there.
ON_A_GPU = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
METHODS = {"snapkv": WHOLE, "adakv": WHOLE | ADAPTIVE, "h2o": {"method": "h2o"}, "adaptive": ADAPTIVE}


@ON_A_GPU
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", METHODS)
def test_methods_generate_in_triton_as_in_the_reference(model, name, batch, device):
    """Whole prompts and chunks, even heads and ragged ones: what selects, copies and merges rows on a GPU."""
    cache = check(model, *BATCHES[batch], "triton", device, **METHODS[name])
    assert cache.compactions >= 2


@ON_A_GPU
@pytest.mark.parametrize("backend", ["triton", "flash", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["asymkv", "adakv"])
def test_generates_in_half_precision(model, name, dtype, backend, device):
    half = copy.deepcopy(model).to(device, dtype)
    _, logits, cache = generate(half, *BATCHES["padded"], backend, **METHODS.get(name, {}))
    assert torch.isfinite(logits).all() and cache.compactions >= 2
    kept = [sum(map(len, row)) for row in cache.positions(0)]
    assert max(kept) <= 2 * (SETTINGS["budget"] + SETTINGS["decode_interval"])


@pytest.fixture
def flash_calls(monkeypatch):
    """FlashAttention's place is taken by PyTorch; whether each call was causal."""
    calls = []

    def varlen(*args):
        calls.append(args[-1])
        return plain_varlen(*args)

    monkeypatch.setattr(backends, "_varlen", lambda dtype: varlen)
    monkeypatch.setitem(backends.BACKENDS, "flash", backends.Backend(backends._flash, backends._always))
    return calls


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", ["asymkv", "asymkv_evict", "h2o"])
def test_flash_generates_as_the_reference_does(model, method, batch, flash_calls):
    cache = check(model, *BATCHES[batch], "flash", method=method, decode_interval=6)
    assert set(flash_calls) == {True, False}, "chunks are causal among their own tokens, decode is not"
    merges = method == "asymkv"
    for layer in cache.layers:
        assert layer.storage.merged == merges and layer.storage.by_class == merges
        # Decode went on behind rows in class order: those are no longer in the order of positions.
        position = torch.stack([layer.storage.run("position", h) for h in range(2)])
        assert bool((position.diff(dim=1) < 0).any()) == merges
