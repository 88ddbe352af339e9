"""A cache on disk goes on as if it had never left; a damaged or foreign one is refused."""

import json

import pytest
import torch
from tiny_models import assert_close, assert_same_rows, left_padded, prompt, tiny_model

import asymkv
from asymkv.serialize import MANIFEST, ROWS

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


def test_damaged_and_missing_files_are_named(tmp_path):
    model = tiny_model()
    make(model, tmp_path)
    folder = tmp_path / "cache"
    load = asymkv.CompressedCache.load
    with pytest.raises(ValueError, match="holds no cache"):
        load(tmp_path / "elsewhere", model)
    rows = (folder / ROWS).read_bytes()
    (folder / ROWS).write_bytes(rows[:-4] + b"oops")
    with pytest.raises(ValueError, match="sha256"):
        load(folder, model)
    (folder / ROWS).unlink()
    with pytest.raises(ValueError, match="incomplete"):
        load(folder, model)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": "other"}))
    with pytest.raises(ValueError, match="unknown format 'other'"):
        load(folder, model)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load(folder, model)


def test_a_failed_save_leaves_the_older_cache(tmp_path, monkeypatch):
    model = tiny_model()
    cache = make(model, tmp_path)
    monkeypatch.setattr("asymkv.serialize.save_file", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.save(tmp_path / "cache")
    monkeypatch.undo()
    assert asymkv.CompressedCache.load(tmp_path / "cache", model).tokens_seen.tolist() == [93, 63]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [MANIFEST, ROWS]


def test_save_needs_the_model(tmp_path):
    model = tiny_model()
    cache = make(model, tmp_path)
    assert torch.is_tensor(cache.tokens_seen)
    del model
    import gc

    gc.collect()
    with pytest.raises(ValueError, match="gone"):
        cache.save(tmp_path / "again")
