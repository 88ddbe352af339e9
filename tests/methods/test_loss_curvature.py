"""Fisher diagonal of the chunk's loss: right numbers, one forward, nothing left behind."""

import pytest
import torch
from tiny_models import assert_close, prompt, tiny_model

import asymkv
from asymkv.methods.asymkv import AsymKV
from asymkv.rope import Rope, apply_rope

SETTINGS = {"method": "asymkv", "curvature": "loss", "budget": 40, "chunk_size": 30}


def test_fisher_matches_autograd_squared_gradient(monkeypatch):
    """All keys of both layers, past and own, against a stock forward in fp64."""
    model = tiny_model(dtype=torch.float64)
    ids = prompt(60)
    seen = {}

    def plan(self, view, heads=None):
        seen[len(seen)] = view.statistics["fisher"].clone()
        return original(self, view)

    original = AsymKV.plan
    monkeypatch.setattr(AsymKV, "plan", plan)
    with asymkv.replace("llama", **SETTINGS):
        model(ids)

    # The same second chunk by the stock forward, on past keys that are leaves before RoPE.
    with torch.no_grad():
        past = model(ids[:, :30]).past_key_values
    leaves = []
    for layer in past.layers:
        rope = Rope(model.model.rotary_emb)
        leaves.append(rope.rotate(layer.keys, -torch.arange(30).expand(1, 2, -1)).requires_grad_())
        cos, sin = rope.tables(torch.arange(30)[None], torch.float64)
        layer.keys = apply_rope(leaves[-1], cos[:, None], sin[:, None])
    new_keys = []
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda m, i, out: new_keys.append(out) or out.retain_grad())
        for layer in model.model.layers
    ]
    out = model(ids[:, 30:], past_key_values=past)
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 31:], reduction="sum")
    loss.backward()
    for layer in range(2):
        own = new_keys[layer].grad.view(1, 30, 2, 16).transpose(1, 2)
        expected = torch.cat([leaves[layer].grad, own], 2).square()
        assert_close(f"fisher of layer {layer}", expected, seen[layer], 1e-5)


def test_one_forward_per_chunk():
    model = tiny_model()
    calls = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *a: calls.append(1))
    with asymkv.replace("llama", **SETTINGS):
        model(prompt(150))
    hook.remove()
    assert len(calls) == 5


def test_leaves_no_grad_no_graph_no_flag_behind():
    model = tiny_model()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with asymkv.replace("llama", **SETTINGS):
        out = model.generate(prompt(150), max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
        again = model(prompt(100))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not again.logits.requires_grad and not out.logits[0].requires_grad
    columns = out.past_key_values.layers[0].storage.columns
    assert not any(c.requires_grad or c.grad_fn is not None for c in columns.values())
    assert out.past_key_values.step is None


def test_weights_thaw_when_the_forward_fails():
    model = tiny_model()
    with asymkv.replace("llama", **SETTINGS):
        hook = model.model.layers[1].register_forward_pre_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(prompt(100))
        hook.remove()
        assert all(p.requires_grad for p in model.parameters())
        model(prompt(100))


def test_inference_mode_is_refused_for_loss_and_works_for_the_rest():
    model = tiny_model()
    with torch.inference_mode(), asymkv.replace("llama", **SETTINGS), pytest.raises(ValueError, match="no_grad"):
        model(prompt(10))
    with asymkv.replace("llama", **{**SETTINGS, "curvature": "output"}):
        with torch.inference_mode():
            cache = model(prompt(100)).past_key_values
        with torch.no_grad():  # a turn outside may go on with the cache
            model(prompt(50), past_key_values=cache)
        assert cache.num_rows(0).tolist() == [[40, 40]]


def test_embeddings_have_no_labels():
    model = tiny_model()
    embeds = model.get_input_embeddings()(prompt(100)).detach()
    with asymkv.replace("llama", **SETTINGS), pytest.raises(ValueError, match="token ids"):
        model(inputs_embeds=embeds)


def test_layers_that_wait_for_each_other_merge_by_the_fisher_too():
    """Without compactions in decode the column is dropped after the chunk, yet the merge of that chunk uses it."""
    model = tiny_model()
    caches = []
    none, later = {"decode_interval": 0}, {"decode_interval": 64}
    for settings in (none, later, {**none, "curvature": "cardinality"}):
        settings = {"curvature": "loss", "layer_budgets": "global", "budget": 60, "chunk_size": 200, **settings}
        with asymkv.replace("llama", model=model, **settings):
            caches.append(model(prompt(200)).past_key_values)
    assert all(torch.equal(a, b) for a, b in zip(caches[0].keys(0)[0], caches[1].keys(0)[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(caches[0].keys(0)[0], caches[2].keys(0)[0], strict=True))
