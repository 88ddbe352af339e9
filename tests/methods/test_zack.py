"""ZACK: bases, ranks, folding, and every cache operation on rows of fewer dimensions (arXiv 2408.04107)."""

import dataclasses
import json

import pytest
import torch
from tiny_models import assert_close, assert_same_rows, left_padded, prompt, tiny_model
from zack_bases import BASES, zack

import asymkv
from asymkv import CompressedCache, CompressionConfig, serialize
from asymkv.analysis.zack_basis import calibrate
from asymkv.dimensions.basis import load
from asymkv.dimensions.projection import fold_input, fold_output, narrowed
from asymkv.rope import apply_rope

LAYERS, HEADS, SIZE = 2, 2, 16
CLUSTERS = {"budget": 40, "num_clusters": 10, "pruning_interval": 32, "lookback_window": 16, "window_size": 8}


def filled(tokens=100, method="zack", *, batch=1, dimensions=None, model=None, **settings):
    """Model and cache after a prompt."""
    model = model or tiny_model()
    with asymkv.replace("llama", model=model, method=method, dimensions=dimensions or zack(), **settings):
        return model, model(prompt(tokens, batch=batch)).past_key_values


# -- attention ---------------------------------------------------------------------------------------------------------
def test_logits_are_off_by_what_is_cut_at_most():
    """|s (q.k - q'.k')| <= s |q_cut| |k_cut|, for the rotated queries and keys of a real layer."""
    model, cache = filled()
    attention, basis = model.model.layers[0].self_attn, cache.projections[0].keys
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(prompt(100)))
    q, k = (p(hidden).unflatten(-1, (-1, SIZE)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    tables = [x[:, None] for x in model.model.rotary_emb(hidden, torch.arange(100)[None])]
    q, k = apply_rope(q, *tables), apply_rope(k, *tables)
    for head in range(HEADS):
        stored = cache.keys(0)[0][head]
        assert_close("stored keys", k[0, head] @ basis[head], stored, 1e-5)
        for query in q[0, 2 * head : 2 * head + 2]:
            error = (query @ k[0, head].T - query @ basis[head] @ stored.T).abs() * attention.scaling
            cut = [(x - x @ basis[head] @ basis[head].T).norm(dim=-1) for x in (query, k[0, head])]
            assert (error <= attention.scaling * cut[0][:, None] * cut[1][None] + 1e-4).all()
            assert error.max() > 0.01  # something was cut


def test_error_falls_with_the_ratio():
    model, ids = tiny_model(), prompt(100)
    ref = model(ids).logits
    errors = []
    for ratio in (0.25, 0.5, 0.75, 1.0):
        with asymkv.replace("llama", model=model, method="zack", dimensions=zack(ratio)):
            errors.append((model(ids).logits - ref).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9 < errors[-2]


def still_model():
    """A llama without a position operation: rotary angles are 0."""
    model = tiny_model()
    model.model.rotary_emb.inv_freq.zero_()
    return model


def gpt2_model():
    return tiny_model("gpt2")


@pytest.mark.parametrize("objective", ["joint", "attention"])
@pytest.mark.parametrize(("make", "fold"), [(tiny_model, True), (still_model, True), (still_model, "all"),
                                              (gpt2_model, True), (gpt2_model, "all")])  # fmt: skip
def test_folded_weights_do_what_rotation_does(make, fold, objective):
    """Prefill, decode and stored rows; biases included, ranks of their own per head."""
    model, ids = make(), prompt(60)
    found = {}
    for how in (False, fold):
        rows = zack(0.5, ranks="energy", multiple=2, least=2, fold=how, objective=objective)
        family = model.config.model_type
        with asymkv.replace(family, model=model, method="h2o", budget=40, window_size=8, dimensions=rows):
            out = model(ids[:, :50])
            steps = [model(ids[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(50, 60)]
        found[how] = out.past_key_values, torch.cat([out.logits, *steps], 1)
    assert_close("logits", found[False][1], found[fold][1], 1e-5)
    assert_same_rows(found[False][0], found[fold][0], rtol=1e-5)


def test_folding_by_hand():
    weight, bias, basis = torch.randn(12, 5), torch.randn(12), torch.randn(2, 3, 2)  # 2 KV heads of 2 query heads
    x, out = torch.randn(7, 5), torch.randn(1, 4, 7, 2)
    full = (x @ weight.T + bias).view(1, 7, 4, 3).transpose(1, 2)
    assert_close("input", narrowed(full, basis), fold_input(weight, bias, basis)(x).view(1, 7, 4, 2).mT.transpose(
        2, 3).transpose(1, 2), 1e-5)  # fmt: skip
    back = narrowed(out, basis.mT).transpose(1, 2).flatten(2) @ torch.ones(12, 5)
    assert_close("output", back, out.transpose(1, 2).flatten(2) @ fold_output(torch.ones(5, 12), basis).T, 1e-5)


def test_rotary_positions_forbid_folding_queries_and_keys():
    with pytest.raises(ValueError, match="fold='all'.*'llama' rotates queries and keys.*allowed: True"):
        filled(dimensions=zack(fold="all"))


def test_adapted_weights_are_not_folded():
    model = tiny_model()
    model.model.layers[1].self_attn.v_proj.__class__ = type("Adapted", (torch.nn.Linear,), {})
    with pytest.raises(ValueError, match="plain linear projections.*found for value Adapted"):
        filled(model=model, dimensions=zack(fold=True))


# -- storage -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_bytes_fall_with_the_dimensions(ratio):
    _, whole = filled(400, "full", dimensions=zack(1.0))
    _, cache = filled(400, dimensions=zack(ratio))
    numbers = [sum(layer.storage.columns[n].numel() for n in ("keys", "values") for layer in c.layers)
               for c in (whole, cache)]  # fmt: skip
    assert numbers[1] == ratio * numbers[0]
    metadata = whole.nbytes - 4 * numbers[0]
    assert abs(cache.nbytes - 4 * numbers[1] - metadata) < 200  # index tables are made when they are asked for
    assert cache.stats()["basis_nbytes"] == ratio * whole.stats()["basis_nbytes"] > 0


def test_heads_of_other_ranks_are_padded_to_the_widest(tmp_path):
    basis = load(BASES, tiny_model())
    peaks = basis.joint.key_energy * torch.tensor([[1, 0.1], [0.5, 1]]).unsqueeze(-1) ** torch.arange(SIZE)
    dataclasses.replace(basis, joint=dataclasses.replace(basis.joint, key_energy=peaks)).save(tmp_path)
    rows = zack(0.5, ranks="energy", multiple=2, least=2, basis=str(tmp_path))
    _, cache = filled(dimensions=rows)
    key_ranks, _ = CompressionConfig("zack", dimensions=rows).row_dimensions.ranks_of(load(tmp_path, tiny_model()))
    assert len(set(key_ranks.flatten().tolist())) > 1 and key_ranks.sum() == LAYERS * HEADS * SIZE // 2
    for layer in range(LAYERS):
        assert cache.layers[layer].storage.columns["keys"].shape[1] == key_ranks[layer].max()
        for head, rank in enumerate(key_ranks[layer].tolist()):
            keys = cache.keys(layer)[0][head]
            assert (keys[:, rank:] == 0).all() and (keys[:, :rank] != 0).any()


def test_keys_or_values_alone():
    for part, width in (("keys", (16, 8)), ("values", (8, 16))):
        _, cache = filled(dimensions=zack(**{part: False}))
        assert [p.widths(SIZE) for p in cache.projections] == [width] * LAYERS
    # Keys that stay as they are can still turn, and be judged before RoPE.
    _, cache = filled(method="streaming_llm", budget=40, dimensions=zack(keys=False))
    assert cache.config.positions == "compact" and cache.num_rows(0).tolist() == [[40, 40]]
    _, cache = filled(method="expected_attention", budget=40, dimensions=zack(keys=False))
    assert cache.num_rows(1).tolist() == [[40, 40]]


def test_a_byte_budget_counts_the_real_rows():
    budget = "60KB"
    _, narrow = filled(2000, "h2o", budget=budget, dimensions=zack(0.5))
    _, whole = filled(2000, "h2o", budget=budget, dimensions=zack(1.0))
    assert narrow.num_rows(0)[0, 0] > 1.5 * whole.num_rows(0)[0, 0]
    assert 50_000 < narrow.nbytes <= 60_000


@pytest.mark.parametrize("backend", ["cpp", "sdpa", "reference"])
def test_backends_agree_where_keys_and_values_differ_in_size(backend):
    """Prefill, decode and a second turn on merged rows, heads of different lengths."""
    model, ids = tiny_model(), prompt(66)
    settings = {"method": "h2o", "head_budgets": "adaptive", "budget": 48, "window_size": 8, "chunk_size": 32}
    found = {}
    for name in ("reference", backend):
        with asymkv.replace("llama", model=model, backend=name, dimensions=zack(keys=False), **settings):
            out = model(ids[:, :60])
            logits = [out.logits]
            for begin, end in ((60, 61), (61, 66)):
                logits.append(model(ids[:, begin:end], past_key_values=out.past_key_values).logits)
        found[name] = torch.cat(logits, 1)
    assert_close("logits", found["reference"], found[backend], 1e-5)


# -- composition -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", ["joint", "attention"])
@pytest.mark.parametrize("method", ["h2o", "snapkv", "asymkv", "kvmerger", "razor", "adakv", "criticalkv"])
def test_methods_compose(method, objective):
    """Fewer rows of fewer dimensions, through prompt, decode and a second turn."""
    scores = {"head_scores": [[0.1, 0.2], [0.9, 0.3]]} if method == "razor" else {}
    model, ids = tiny_model(), prompt(200)
    settings = {"budget": 64, "window_size": 8, "dimensions": zack(objective=objective), **scores}
    with asymkv.replace("llama", model=model, method=method, **settings):
        out = model(ids[:, :150])
        cache = out.past_key_values
        assert sum(int(cache.num_rows(layer).sum()) for layer in range(LAYERS)) == 64 * LAYERS * HEADS
        for begin, end in ((150, 151), (151, 152), (152, 200)):
            out = model(ids[:, begin:end], past_key_values=cache)
            assert out.logits.isfinite().all()
    assert sum(int(cache.num_rows(layer).sum()) for layer in range(LAYERS)) == 64 * LAYERS * HEADS
    assert cache.layers[0].storage.columns["keys"].shape[1] < SIZE
    if method in ("asymkv", "razor"):
        for layer in range(LAYERS):
            assert [int(n.sum()) for n in cache.cardinality(layer)[0]] == [200, 200]


def test_keys_merge_as_they_are_stored():
    """A merged row's key and value are means of the stored rows of its members, by cardinality."""
    _, every = filled(120, "full", dimensions=zack())
    _, merged = filled(120, "asymkv", budget=60, window_size=8, chunk_size="prompt", dimensions=zack())
    checked = 0
    for head in range(HEADS):  # of layer 0: it does not see what other layers lost
        n, at = merged.cardinality(0)[0][head], merged.positions(0)[0][head]
        for name in ("keys", "values"):
            source, found = getattr(every, name)(0)[0][head], getattr(merged, name)(0)[0][head]
            for count, last, row in zip(n.tolist(), at.tolist(), found, strict=True):
                assert_close(name, source[last + 1 - count : last + 1].mean(0), row, 1e-5)
                checked += count > 1
    assert checked


def test_loss_curvature_weighs_stored_coordinates():
    _, cache = filled(150, "asymkv", curvature="loss", budget=64, window_size=8, chunk_size=50, dimensions=zack())
    assert cache.layers[0].storage.columns["fisher"].shape[1] == 8
    assert [int(n.sum()) for n in cache.cardinality(1)[0]] == [150, 150]


def test_a_turn_after_inference_mode():
    """What the cache holds of its basis may take part in a backward pass later."""
    model, ids = tiny_model(), prompt(160)
    settings = {"method": "asymkv", "curvature": "loss", "budget": 200, "window_size": 8, "dimensions": zack(fold=True)}
    with asymkv.replace("llama", model=model, **settings):
        with torch.inference_mode():
            cache = CompressedCache.for_model(CompressionConfig(**settings), model)
        model(ids[:, :150], past_key_values=cache)
        cache.config = cache.config.replace(budget=64)
        out = model(ids[:, 150:], past_key_values=cache)
    assert out.logits.isfinite().all() and cache.num_rows(0).tolist() == [[64, 64]]


def test_padded_batches_save_fork_and_crop(tmp_path):
    model = tiny_model()
    ids, mask, alone = left_padded([60, 90])
    with asymkv.replace("llama", model=model, method="h2o", budget=48, window_size=8, dimensions=zack()):
        cache = model(ids, attention_mask=mask).past_key_values
        for row, own in enumerate(alone):
            assert_same_rows(model(own).past_key_values, cache, row_b=row, rtol=1e-5)
        cache.save(tmp_path)
        loaded, copy = CompressedCache.load(tmp_path, model), cache.fork()
        assert_same_rows(cache, loaded, row_a=1, row_b=1)
        step = torch.full((2, 1), 7)
        after = torch.cat([mask, torch.ones_like(step)], 1)
        logits = [model(step, attention_mask=after, past_key_values=c).logits for c in (cache, loaded, copy)]
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
        cache.crop(-1)
        assert cache.tokens_seen.tolist() == [60, 90]


def test_rows_of_another_basis_are_not_loaded(tmp_path):
    model, other = tiny_model(), tmp_path / "other"
    calibrate(model, [prompt(64, seed=3)[0]]).save(other)
    _, cache = filled(model=model)
    cache.save(tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["dimensions"]["basis"] = str(other)
    del manifest["sha256"]
    path.write_text(json.dumps({**manifest, "sha256": serialize._checksum(manifest)}))
    with pytest.raises(ValueError, match="in the coordinates of the basis .*point dimensions.basis to the one"):
        CompressedCache.load(tmp_path / "cache", model)


def test_questions_on_a_compressed_context():
    """``ask`` goes on in the same coordinates on a copy that is not compacted."""
    from tiny_models import tiny_tokenizer

    model, tokenizer = tiny_model(), tiny_tokenizer()
    context = " ".join(f"w{i % 120}" for i in range(80))
    cache = asymkv.compress(model, tokenizer, context, method="zack", ratio=0.5, dimensions=zack(None))
    before = cache.nbytes
    assert cache.config.row_dimensions.ratio == 0.5
    asymkv.ask(model, tokenizer, cache, "w3 w4", max_new_tokens=4, do_sample=False)
    assert cache.nbytes == before


# -- settings ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("settings", "message"), [
    ({"dimensions": "pca"}, r"unknown dimensions 'pca'; allowed: \['zack'\]"),
    ({"dimensions": {"kind": "zack", "rank": 4}}, r"unknown keys \['rank'\] of dimensions='zack'; allowed: .*ratio"),
    ({"dimensions": {"kind": "zack", "ratio": 0}}, "must be above 0; found 0"),
    ({"dimensions": {"kind": "zack", "ratio": 1.5}}, "must be a number from 0 to 1; found 1.5"),
    ({"dimensions": {"kind": "zack", "ranks": "best"}}, "ranks.*'best'; allowed: .*uniform"),
    ({"dimensions": {"kind": "zack", "objective": "kq"}}, "objective.*'kq'; allowed: .*attention"),
    ({"dimensions": {"kind": "zack", "ratio": 0.5, "ranks": 8}}, "ratio or given ranks; found ratio=0.5, ranks=8"),
    ({"dimensions": {"kind": "zack", "multiple": 3}}, "multiple.*must be even; found 3"),
    ({"dimensions": {"kind": "zack", "least": 0}}, "least.*>= 1; found 0"),
    ({"dimensions": {"kind": "zack", "fold": "keys"}}, "fold.*'keys'; allowed: .*'all'"),
    ({"dimensions": {"kind": "zack", "fold": True, "values": False}}, "fold=True .*needs what it folds"),
    ({"method": "streaming_llm", "dimensions": "zack"}, "position_policy must be 'original'.*found 'compact'"),
    ({"method": "expected_attention", "dimensions": "zack"}, "before RoPE, which projected keys do not have"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**{"method": "zack", **settings})


def test_ratio_means_dimensions_only_where_every_row_is_kept():
    assert CompressionConfig("zack", ratio=0.25).row_dimensions.ratio == 0.25
    assert CompressionConfig("zack", ratio=0.25, dimensions=zack(0.75)).row_dimensions.ratio == 0.75
    assert CompressionConfig("zack").row_dimensions.ratio == 0.5
    assert CompressionConfig("h2o", ratio=0.25, dimensions="zack").row_dimensions.ratio == 0.5
    assert CompressionConfig("h2o", ratio=0.25).row_dimensions is None
    assert "dimensions=zack 0.25" in CompressionConfig("zack", ratio=0.25).describe()
    rows = {"kind": "zack", "ranks": [8, 12], "objective": "attention"}
    assert "dimensions=zack ranks=[8, 12] (attention)" in CompressionConfig("zack", dimensions=rows).describe()
    with pytest.raises(ValueError, match="ranks=8 says how many dimensions; ratio=0.25 would change nothing"):
        CompressionConfig("zack", ratio=0.25, dimensions={"kind": "zack", "ranks": 8})
    assert CompressionConfig("zack", ratio=0.25).replace(ratio=0.5).row_dimensions.ratio == 0.5


# -- with clusters -----------------------------------------------------------------------------------------------------
def test_clusters_of_narrower_values_are_those_of_whole_ones_projected(tmp_path):
    """Keys as they are decide alike; a mean of projected values is the projected mean."""
    model = tiny_model(num_hidden_layers=1)
    calibrate(model, [prompt(64)[0]]).save(tmp_path)
    values_alone = zack(keys=False, basis=str(tmp_path))
    _, narrow = filled(method="aagc", model=model, dimensions=values_alone, **CLUSTERS)
    with asymkv.replace("llama", model=model, method="aagc", **CLUSTERS):
        whole = model(prompt(100)).past_key_values
    basis = narrow.projections[0].values
    assert narrow.compactions > 0 and narrow.values(0)[0][0].shape[-1] == 8 != narrow.keys(0)[0][0].shape[-1]
    for head in range(HEADS):
        assert torch.equal(narrow.keys(0)[0][head], whole.keys(0)[0][head])
        assert_close("values", whole.values(0)[0][head] @ basis[head], narrow.values(0)[0][head], 1e-5)


def test_keys_that_were_projected_cannot_be_turned_back_for_clusters():
    """They would be clustered as they are stored, and the setting would say otherwise."""
    settings = {**CLUSTERS, "rope_mode": "derotate"}
    with pytest.raises(ValueError, match="rope_mode='derotate' turns stored keys back.*use rope_mode='post'"):
        CompressionConfig("aagc", dimensions=zack(), **settings)
    assert CompressionConfig("aagc", dimensions=zack(keys=False), **settings).row_dimensions is not None
    assert CompressionConfig("aagc", dimensions=zack(), **CLUSTERS).row_dimensions is not None


@pytest.mark.parametrize("only", [{}, {"keys": False}, {"values": False}], ids=str)
def test_heads_that_store_in_directions_of_their_own_share_no_centroids(only):
    with pytest.raises(ValueError, match="seed_compat=True shares centroids between heads"):
        CompressionConfig("aagc", dimensions=zack(**only), budget=40, num_clusters=10, seed_compat=True)


def test_a_share_of_dimensions_is_called_one():
    with pytest.raises(ValueError, match="ratio is the share of dimensions kept.*found 1.5"):
        CompressionConfig("zack", ratio=1.5)
    with pytest.raises(ValueError, match="ratio is the share of rows kept.*found 1.5"):
        CompressionConfig("h2o", dimensions=zack(), ratio=1.5)
