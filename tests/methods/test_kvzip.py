"""KVzip keeps the best scores of a prompt, at the level that is asked for, and everything that comes later."""

import json

import pytest
import torch
from tiny_models import (
    HEAD_SCORES,
    OPTIONS,
    assert_close,
    assert_same_rows,
    left_padded,
    prompt,
    tiny_model,
    tiny_tokenizer,
)

import asymkv
from asymkv.methods.kvzip import head_scores
from asymkv.replay_scores import SCORE

KVZIP = {"method": "kvzip", **OPTIONS["kvzip"]}
LEVELS = ("pair", "pair_uniform", "layer", "head")
TEMPLATE = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}w1 w2 {% endif %}{{ m.role }} w3 "
            "{{ m.content }} w4 {% endfor %}{% if add_generation_prompt %}w5 w6{% endif %}")  # fmt: skip


def filled(model, length=120, batch=1, **settings):
    with asymkv.replace("llama", model=model, **{**KVZIP, **settings}):
        return model(prompt(length, batch)).past_key_values


def scores(cache):
    """``[L, H_kv, t]`` of a cache that kept every row."""
    return torch.stack([layer.dense(SCORE)[0] for layer in cache.layers])


def kept(cache, length=120):
    """``[L, H_kv, t]`` bool."""
    out = torch.zeros(2, 2, length, dtype=torch.bool)
    for layer in range(2):
        for head, positions in enumerate(cache.positions(layer)[0]):
            out[layer, head, positions] = True
    return out


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_ratio_one_keeps_every_row_and_its_score(model):
    cache = filled(model, ratio=1.0)
    assert kept(cache).all() and scores(cache).min() > 0 and scores(cache).max() <= 1
    assert torch.equal(scores(cache), scores(filled(model, retain=True, ratio=0.3)))


@pytest.mark.parametrize(("level", "axes"), [("pair", (0, 1, 2)), ("layer", (1, 2)), ("pair_uniform", (2,))])
def test_levels_rank_over_the_whole_cache_a_layer_or_a_head(model, level, axes):
    """In each part that is ranked by itself, exactly the budget is kept, and nothing that goes beats what stays."""
    worth = scores(filled(model, retain=True))
    keep = kept(filled(model, ratio=0.4, level=level))
    assert keep[..., :4].all()
    assert (keep.sum(axes) == 48 * keep.sum(axes).new_tensor([keep.shape[a] for a in axes[:-1]]).prod()).all()
    least = worth.masked_fill(~keep, 2)[..., 4:].amin(axes)
    assert (worth.masked_fill(keep, -1).amax(axes) <= least).all()


def test_level_head_empties_whole_heads(model):
    """Sinks, window and prefix stay in every head; of the others, the weakest lose everything else."""
    cache = filled(model, ratio=0.6, level="head", window_size=8, prefix=10)
    keep, worth = kept(cache), head_scores(filled(model, retain=True, window_size=8, prefix=10))
    fixed = torch.zeros(120, dtype=torch.bool)
    fixed[:10] = fixed[-8:] = True
    whole = keep.all(-1)
    assert (keep[~whole] == fixed).all() and 0 < whole.sum() < 4 and keep.float().mean() <= 0.6
    assert worth[whole].min() >= worth[~whole].max()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [{"ratio": 0.5}, {"ratio": 0.2}, {"budget": 33}], ids=str)
def test_pruning_a_retained_cache_is_evicting_at_once(model, level, size):
    retained = filled(model, batch=2, retain=True, level=level)
    before = retained.fork()
    pruned = retained.prune(**size)
    direct = filled(model, batch=2, level=level, **size)
    for row in range(2):
        assert_same_rows(direct, pruned, row_a=row, row_b=row)
        assert_same_rows(before, retained, row_a=row, row_b=row)
    assert pruned.compactions == 1 and pruned.nbytes < retained.nbytes and pruned.config == direct.config
    with asymkv.replace("llama", model=model):
        a, b = (model(prompt(9, 2, seed=5), past_key_values=c).logits for c in (direct, pruned))
    assert_close("second turn", a, b, 1e-5)


def test_prune_again_and_padded(model):
    ids, mask, alone = left_padded([100, 60])
    with asymkv.replace("llama", model=model, **KVZIP, ratio=0.7):
        cache = model(ids, attention_mask=mask).past_key_values
        ones = [model(row).past_key_values for row in alone]
    for row in range(2):
        assert_same_rows(ones[row].prune(ratio=0.3), cache.prune(ratio=0.3), row_b=row)
    assert cache.prune(ratio=0.3).stats()["budget"] == [30, 18]


def test_prune_needs_scores_and_one_size(model):
    with asymkv.replace("llama", method="h2o", model=model):
        cache = model(prompt(50)).past_key_values
    with pytest.raises(ValueError, match=r"method='h2o'\) stores no scores .*retain=True"):
        cache.prune(ratio=0.5)
    for size in ({}, {"ratio": 0.5, "budget": 40}):
        with pytest.raises(ValueError, match="exactly one of ratio and budget"):
            filled(model, retain=True).prune(**size)
    with pytest.raises(ValueError, match="no scores"):
        head_scores(cache)


def test_generated_rows_stay_and_a_later_turn_is_scored_by_itself(model):
    with asymkv.replace("llama", model=model, **KVZIP, ratio=0.5, level="pair_uniform"):
        cache = model(prompt(100)).past_key_values
        first = {(i, h): dict(zip(p.tolist(), cache.layers[i].storage.rows(SCORE, h).tolist(), strict=True))
                 for i in range(2) for h, p in enumerate(cache.positions(i)[0])}  # fmt: skip
        for i in range(7):
            model(torch.tensor([[20 + i]]), past_key_values=cache)
        assert cache.num_rows(0).tolist() == [[57, 57]]
        model(prompt(40, seed=8), past_key_values=cache)
    assert cache.num_rows(0).tolist() == [[77, 77]], "half of the prompts, and the answer on top"
    for i in range(2):
        for head, positions in enumerate(cache.positions(i)[0]):
            now = dict(zip(positions.tolist(), cache.layers[i].storage.rows(SCORE, head).tolist(), strict=True))
            assert set(range(100, 107)) <= now.keys()
            assert all(now[p] == first[i, head][p] for p in now if p < 100)
            assert all((s == 0) == (100 <= p < 107) for p, s in now.items())
            assert any(p >= 107 for p in now)


@pytest.mark.parametrize("method", ["kvzip", "echo"])
def test_answers_do_not_push_the_context_out(model, method):
    """A ratio is of the prompts; what is generated in a conversation comes on top of it."""
    settings = {**KVZIP, "method": method, "ratio": 0.3, "sink_size": 4, "window_size": 0}
    with asymkv.replace("llama", model=model, **settings), torch.no_grad():
        cache = model(prompt(200)).past_key_values
        for turn in range(3):
            for i in range(64):
                model(torch.tensor([[20 + i]]), past_key_values=cache)
            model(prompt(10, seed=turn), past_key_values=cache)
    rows = sum(int(cache.num_rows(layer).sum()) for layer in range(2))
    assert rows == 4 * (int(0.3 * 230) + 3 * 64)
    context = [sum(p < 200 for p in head.tolist()) for layer in range(2) for head in cache.positions(layer)[0]]
    assert sum(context) > 0.75 * 4 * 60


def test_pruning_leaves_answers_out_of_the_ratio_and_cropped_prompts_too(model):
    def context(cache):
        return sum(p < 100 for layer in range(2) for head in cache.positions(layer)[0] for p in head.tolist())

    with asymkv.replace("llama", model=model, **KVZIP, ratio=0.5, retain=True), torch.no_grad():
        cache = model(prompt(100)).past_key_values
        once = cache.prune(ratio=0.5)
        model(prompt(30, seed=3), past_key_values=cache)
        cache.crop(-30)
        assert cache.prompt_tokens == [100] and kept(cache.prune(ratio=0.5), 100).equal(kept(once, 100))
        for i in range(40):
            model(torch.tensor([[20 + i]]), past_key_values=cache)
        assert context(cache.prune(ratio=0.5)) == 200
        cache.crop(-40)
        assert cache.prompt_tokens == [100] and cache.pending == [0]


def test_pruning_by_head_scores_counts_no_token_that_is_not_there(model):
    split = {"kind": "retrieval", "file": HEAD_SCORES}
    cache = filled(model, 150, ratio=0.5, retain=True, layer_budgets="uniform", head_budgets=split)
    whole, half = cache.prune(ratio=1.0), cache.prune(ratio=0.5)
    direct = filled(model, 150, ratio=0.5, layer_budgets="uniform", head_budgets=split)
    for layer in range(2):
        assert whole.num_rows(layer).tolist() == [[150, 150]]
        assert half.num_rows(layer).equal(direct.num_rows(layer))


def test_head_scores_are_the_best_of_positions_and_samples(model):
    both = head_scores(filled(model, batch=2, retain=True))
    apart = [filled(model, batch=2, retain=True).layers[i].dense(SCORE) for i in range(2)]
    assert torch.equal(both, torch.stack([s.amax((0, 2)) for s in apart])) and both.shape == (2, 2)


def test_unkept_prefix_goes_first(model):
    cache = filled(model, ratio=0.8, prefix=15, keep_prefix=False)
    assert (kept(cache)[..., :15].sum(-1) == 4).all()
    assert kept(filled(model, ratio=0.3, prefix=15))[..., :15].all()


def test_saved_with_its_scores(model, tmp_path):
    cache = filled(model, retain=True, batch=2)
    cache.save(tmp_path / "cache")
    loaded = asymkv.CompressedCache.load(tmp_path / "cache", model)
    assert loaded.config == cache.config
    for row in range(2):
        assert_same_rows(cache.prune(ratio=0.3), loaded.prune(ratio=0.3), row_a=row, row_b=row)
    manifest = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert manifest["config"]["repeat_ids"] == list(OPTIONS["kvzip"]["repeat_ids"])


def test_the_models_own_tokenizer_gives_the_words(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = type(tiny_model()).from_pretrained(tmp_path)
    method = asymkv.CompressionConfig("kvzip", prefix="template").options
    wording = method.wording_for(model)
    assert wording.prefix == 4 and wording.suffix == tuple(tokenizer.convert_tokens_to_ids(["w4", "w5", "w6"]))
    assert len(wording.again) > len(wording.repeat) > 0
    own = filled(model, ratio=0.5, prefix=4, repeat_ids=wording.repeat, continue_ids=wording.again,
                 suffix_ids=wording.suffix)  # fmt: skip
    words = {"prefix": "template", "repeat_ids": None, "continue_ids": None, "suffix_ids": None}
    assert_same_rows(own, filled(model, ratio=0.5, **words))
    nameless = tiny_model()
    assert_same_rows(own, filled(nameless, ratio=0.5, tokenizer=str(tmp_path), **words))


def test_a_missing_tokenizer_is_named_before_anything_is_stored(model, tmp_path):
    for settings in ({}, {"tokenizer": str(tmp_path / "nothing")}):
        with (
            asymkv.replace("llama", model=model, method="kvzip", **settings) as handle,
            pytest.raises(ValueError, match=r"pass tokenizer=.*asymkv.compress\(model, tokenizer"),
        ):
            cache = handle.new_cache(model)
            model(prompt(20), past_key_values=cache)
        assert not cache.in_call and not cache.max_rows()


def test_scores_made_under_inference_mode_serve_outside(model):
    with torch.inference_mode():
        cache = filled(model, retain=True)
    assert_same_rows(filled(model, ratio=0.4), cache.prune(ratio=0.4))
    with asymkv.replace("llama", model=model), torch.no_grad():
        model(prompt(9, seed=5), past_key_values=cache)
    assert cache.tokens_seen.tolist() == [129] and scores(cache).min() > 0


def test_assisted_generation_is_refused(model):
    with asymkv.replace("llama", model=model, **KVZIP, retain=True), pytest.raises(ValueError, match="assisted"):
        model.generate(prompt(30), assistant_model=model, max_new_tokens=3)


def test_embeddings_are_refused(model):
    with asymkv.replace("llama", model=model, **KVZIP), pytest.raises(ValueError, match="found inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(prompt(20)))


@pytest.mark.parametrize(("settings", "message"), [
    ({"level": "row"}, "level='row'; allowed"),
    ({"wording": "mine"}, "wording='mine'; allowed"),
    ({"retain": 1}, "retain must be True or False"),
    ({"replay_chunk": 0}, "replay_chunk must be"),
    ({"prefix": "system"}, "prefix must be"),
    ({"suffix_ids": [3]}, "go with repeat_ids"),
    ({"chunk_size": 64}, "whole prompt at once"),
    ({"level": "head", "layer_budgets": "uniform"}, "level='head' needs"),
    ({"level": "pair_uniform", "layer_budgets": "global"}, "equally many rows"),
    ({"level": "layer", "layer_budgets": "global"}, "splits within layers"),
], ids=lambda x: str(x))  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        asymkv.CompressionConfig("kvzip", **settings)


def test_defaults_of_the_levels():
    made = {level: asymkv.CompressionConfig("kvzip", level=level) for level in LEVELS}
    assert [c.layer_budgets for c in made.values()] == ["global", "uniform", "uniform", "global"]
    assert made["layer"].head_budgets == {"kind": "adaptive", "mode": "hard", "floor": 0}
    assert all(c.decode_interval == 0 and c.window_size == 0 for c in made.values())
    assert asymkv.CompressionConfig("kvzip", layer_budgets="uniform").layer_budgets == "uniform"


@pytest.mark.parametrize("size", [{"budget": 30}, {"ratio": 0.15}, {"budget": "20KiB"}])
def test_a_prefix_that_fills_the_budget_is_refused(size):
    model = tiny_model()
    settings = {"method": "kvzip", "prefix": 30, **OPTIONS["kvzip"], **size}
    with asymkv.replace("llama", model=model, **settings), pytest.raises(ValueError, match="prefix=30.*keep_prefix"):
        model(prompt(200))
    with asymkv.replace("llama", model=model, keep_prefix=False, **settings):
        assert model(prompt(200)).past_key_values.num_rows(0).sum() > 0


def test_a_prefix_that_fills_a_smaller_budget_is_refused_when_it_is_pruned_to():
    model = tiny_model()
    with asymkv.replace("llama", model=model, method="kvzip", prefix=30, retain=True, **OPTIONS["kvzip"]):
        cache = model(prompt(200)).past_key_values
    assert cache.prune(budget=40).max_rows() > 30
    with pytest.raises(ValueError, match="prefix=30 rows are always kept, and 20 rows"):
        cache.prune(budget=20)


@pytest.mark.parametrize(("method", "settings"), [
    ("kvzip", {}), ("kvzip", {"prefix": 6}), ("kvzip", {"level": "pair_uniform"}),
    *(("echo", {"action": action, "chunk_size": 12, "window_size": 4}) for action in ("drop", "merge", "both")),
], ids=str)  # fmt: skip
def test_a_budget_in_rows_holds_however_long_the_answer(model, method, settings):
    """Generated tokens take half of what is free at most; then the oldest of them go. A prefix stays."""
    budget, every, given = 30, 5, {"sink_size": 2, **OPTIONS[method], **settings}
    with asymkv.replace("llama", model=model, method=method, budget=budget, decode_interval=every, **given):
        cache = model(prompt(20)).past_key_values
        for i in range(70):
            model(prompt(1, seed=i), past_key_values=cache)
            assert cache.stats()["rows"] < 4 * (budget + every)
        model(prompt(12), past_key_values=cache)
    assert cache.stats()["rows"] == 4 * budget and cache.peak_rows <= budget + every + 12
    first = settings.get("prefix", 2)
    room = (budget - first - settings.get("window_size", 0)) // 2
    room += settings.get("action") == "merge"  # one row stands for all that went
    for layer in range(2):
        for positions in cache.positions(layer)[0]:
            assert positions[:first].tolist() == list(range(first))
            assert [p for p in positions.tolist() if 20 <= p < 90] == list(range(90 - room, 90))
