"""GPU backends through plain generate on the CPU: Triton in its interpreter, FlashAttention by a PyTorch stand-in."""

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
    """Tokens, logits of every step and the cache."""
    with asymkv.replace("llama", **{**SETTINGS, **settings, "backend": backend}):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=10, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    assert out.past_key_values.stats()["backend"] == backend
    return out.sequences, torch.stack(out.logits), out.past_key_values


def check(model, ids, mask, backend, **settings):
    want = generate(model, ids, mask, "reference", **settings)
    have = generate(model, ids, mask, backend, **settings)
    assert torch.equal(want[0], have[0])
    assert_close("logits", want[1], have[1], 2e-5)
    for layer in range(2):
        assert torch.equal(want[2].num_rows(layer), have[2].num_rows(layer))
    return have[2]


BATCHES = {"alone": (prompt(50), None), "padded": left_padded([50, 21])[:2]}


@pytest.mark.parametrize("batch", BATCHES)
def test_triton_generates_as_the_reference_does(model, batch, device, monkeypatch):
    """A prompt of four chunks, all but the first on a compressed cache, then decode through two compactions."""
    if device.type == "cuda":
        pytest.skip("the comparison with fp32 arithmetic on the CPU is for the interpreter")
    calls = []
    attend = backends.triton_attention.attend
    monkeypatch.setattr(backends.triton_attention, "attend", lambda *a: calls.append(a[0].shape[2]) or attend(*a))
    cache = check(model, *BATCHES[batch], "triton")
    assert {1, 16} <= set(calls), "decode and chunks both ran in Triton"
    assert cache.compactions >= 4 and cache.stats()["represented_tokens"] > 0


@pytest.fixture
def flash_calls(monkeypatch):
    """FlashAttention's place is taken by PyTorch; whether each call was causal."""
    calls = []

    def varlen(*args):
        calls.append(args[-1])
        return plain_varlen(*args)

    monkeypatch.setattr(backends, "_varlen", lambda: varlen)
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
