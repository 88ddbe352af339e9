"""A cache on disk goes on as if it had never left; a damaged or foreign one is refused."""

import json

import pytest
import torch
from tiny_models import assert_close, assert_same_rows, left_padded, prompt, tiny_model

import asymkv
from asymkv.fingerprint import fingerprint
from asymkv.serialize import MANIFEST

SETTINGS = {"budget": 48, "chunk_size": 32, "decode_interval": 8}


def make(model, tmp_path, **settings):
    ids, mask, _ = left_padded([90, 60])
    with asymkv.replace("llama", model=model, **{**SETTINGS, **settings}):
        cache = model(ids, attention_mask=mask).past_key_values
        for i in range(3):
            model(prompt(1, 2, seed=i), past_key_values=cache)
    cache.save(tmp_path / "cache")
    return cache


@pytest.mark.parametrize("settings", [{}, {"curvature": "loss"}, {"method": "h2o"}, {"method": "streaming_llm"},
                                      {"method": "full", "chunk_size": None}], ids=str)  # fmt: skip
def test_a_loaded_cache_goes_on_identically(tmp_path, settings):
    model = tiny_model()
    cache = make(model, tmp_path, **settings)
    loaded = asymkv.CompressedCache.load(tmp_path / "cache", model)
    assert loaded.config == cache.config
    before, after = cache.stats(), loaded.stats()
    assert 0 <= before.pop("nbytes") - after.pop("nbytes") < 300  # index tables come back when they are needed
    assert before == after
    with asymkv.replace("llama", model=model):
        for step in [prompt(1, 2, seed=i) for i in range(9)] + [prompt(50, 2)]:
            a, b = (model(step, past_key_values=c).logits for c in (cache, loaded))
            assert_close("logits", a, b, 1e-6)
    for row in range(2):
        assert_same_rows(cache, loaded, row_a=row, row_b=row)


def test_what_a_method_remembers_is_saved(tmp_path):
    model = tiny_model()
    cache = make(model, tmp_path)
    for layer in cache.layers:
        layer.memory["threshold"] = torch.tensor([0.25, float("nan")]) + layer.index
    cache.save(tmp_path / "again")
    loaded = asymkv.CompressedCache.load(tmp_path / "again", model)
    for a, b in zip(cache.layers, loaded.layers, strict=True):
        assert list(b.memory) == ["threshold"]
        assert torch.equal(a.memory["threshold"].nan_to_num(), b.memory["threshold"].nan_to_num())
        assert set(b.storage.columns) == set(a.storage.columns)


def test_another_model_is_refused(tmp_path):
    make(tiny_model(), tmp_path)
    for other in (tiny_model(seed=1), tiny_model("qwen2"), tiny_model(num_hidden_layers=3)):
        with pytest.raises(ValueError, match=r"not of .*\(saved, given\)"):
            asymkv.CompressedCache.load(tmp_path / "cache", other)


@pytest.mark.parametrize("projection", ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"])
def test_a_fine_tuned_model_is_another_one_whatever_was_tuned(tmp_path, projection):
    """Files of any dtype know it too: signs are sampled, and a tuned weight changes some."""
    model = tiny_model()
    make(model, tmp_path)
    before = fingerprint(model, any_dtype=True)["weights_sha256"]
    assert fingerprint(tiny_model(dtype=torch.bfloat16), any_dtype=True)["weights_sha256"] == before
    weight = model.model.layers[-1].get_submodule(projection).weight
    with torch.no_grad():
        weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"not of .*\(saved, given\)"):
        asymkv.CompressedCache.load(tmp_path / "cache", model)
    assert fingerprint(model, any_dtype=True)["weights_sha256"] != before


def test_damaged_and_missing_files_are_named(tmp_path):
    model = tiny_model()
    make(model, tmp_path)
    folder = tmp_path / "cache"
    load = asymkv.CompressedCache.load
    with pytest.raises(ValueError, match="holds no cache"):
        load(tmp_path / "elsewhere", model)
    manifest = json.loads((folder / MANIFEST).read_text())
    for change in ({"tail": []}, {"config": {**manifest["config"], "budget": 12}}, {"rows": "../other"}):
        (folder / MANIFEST).write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match="damaged: its checksum"):
            load(folder, model)
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if k != "layers"}))
    with pytest.raises(ValueError, match="damaged: its checksum"):
        load(folder, model)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    rows = folder / manifest["rows"]
    rows.write_bytes(rows.read_bytes()[:-4] + b"oops")
    with pytest.raises(ValueError, match=f"{rows.name} is damaged"):
        load(folder, model)
    rows.unlink()
    with pytest.raises(ValueError, match="incomplete"):
        load(folder, model)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": "other"}))
    with pytest.raises(ValueError, match="unknown format 'other'"):
        load(folder, model)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load(folder, model)


@pytest.mark.parametrize("step", ["save_file", "write_atomic"])
def test_a_failed_save_leaves_the_older_cache(tmp_path, monkeypatch, step):
    """Whether the rows could not be written, or the manifest after them."""
    model = tiny_model()
    cache = make(model, tmp_path)
    before = sorted(p.name for p in (tmp_path / "cache").iterdir())
    monkeypatch.setattr(f"asymkv.serialize.{step}", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.fork().save(tmp_path / "cache")
    monkeypatch.undo()
    assert asymkv.CompressedCache.load(tmp_path / "cache", model).tokens_seen.tolist() == [93, 63]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == before
    cache.save(tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the older rows are gone


def test_save_needs_the_model(tmp_path):
    model = tiny_model()
    cache = make(model, tmp_path)
    assert torch.is_tensor(cache.tokens_seen)
    del model
    import gc

    gc.collect()
    with pytest.raises(ValueError, match="gone"):
        cache.save(tmp_path / "again")


def test_a_cache_says_which_gate_chose_its_rows(tmp_path, caplog, monkeypatch):
    """Its rows are as good as they were, but what comes is judged by another."""
    from gate_files import random_gate

    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path / "cached"))
    model = tiny_model()
    random_gate(model).save()
    cache = make(model, tmp_path, method="gate")
    asymkv.CompressedCache.load(tmp_path / "cache", model)
    assert not caplog.records
    random_gate(model, seed=1).save()
    loaded = asymkv.CompressedCache.load(tmp_path / "cache", model)
    assert_same_rows(cache, loaded)
    assert "compressed by another gate than is found now" in caplog.text
    caplog.clear()
    loaded.save(tmp_path / "again")
    asymkv.CompressedCache.load(tmp_path / "again", model)
    assert "compressed by another gate than is found now" in caplog.text, "the rows are still the first gate's"
