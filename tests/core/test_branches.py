"""One prefill for several settings: every cache is what a prefill of its own would have left, to the last bit."""

import pytest
import torch
from tiny_models import OPTIONS, head_scores, left_padded, prompt, tiny_model, tiny_tokenizer
from zack_bases import zack

import asymkv
from asymkv import CompressionConfig, compress, compress_many
from asymkv.branches import prefill_key
from asymkv.longbench.measure import Subject
from asymkv.longbench.models import ModelSpec
from asymkv.longbench.shared_prefill import prefill_together, share_groups
from asymkv.methods import METHODS

WHOLE = sorted(name for name, cls in METHODS.items() if cls.chunk_size is None and name not in ("full", "kvzip"))
COLUMNS = ("keys", "values", "cardinality", "positions")


def settings(method, **given):
    own = {**OPTIONS.get(method, {}), **head_scores(METHODS[method])}
    return CompressionConfig(method, **{"window_size": 8, **own, **given})


def assert_equal(shared, alone):
    """Rows, counters and bytes of two caches."""
    for layer in range(len(alone.layers)):
        for name in COLUMNS:
            for row, other in zip(getattr(shared, name)(layer), getattr(alone, name)(layer), strict=True):
                for a, b in zip(row, other, strict=True):
                    assert torch.equal(a, b), name
        assert shared.layers[layer].columns_seen == alone.layers[layer].columns_seen
    found, expected = shared.stats(), alone.stats()
    # A copied layer makes its small tables of lengths anew, a little later.
    for name in ("nbytes", "peak_nbytes"):
        assert found.pop(name) == pytest.approx(expected.pop(name), rel=5e-3)
    assert found == expected
    assert shared.tail.shape == alone.tail.shape and not shared.in_call


def one_by_one(model, configs, ids, mask=None):
    """Prefills of their own."""
    return [compress(model, None, ids, config, attention_mask=mask) for config in configs]


def test_every_method_that_reads_a_whole_prompt_shares_it():
    model, ids = tiny_model(), prompt(140)
    configs = [settings(method, ratio=ratio) for method in WHOLE for ratio in (0.5, 0.25)]
    configs = [config for config in configs if prefill_key(config) == prefill_key(settings("snapkv"))]
    assert {"snapkv", "adakv", "pyramidkv", "expected_attention", "chunkkv", "criticalkv"} <= {
        c.method for c in configs
    }
    for shared, alone in zip(compress_many(model, None, ids, configs), one_by_one(model, configs, ids), strict=True):
        assert_equal(shared, alone)


@pytest.mark.parametrize("level", ["pair", "pair_uniform", "layer", "head"])
def test_budgets_of_kvzip_share_its_replay(level):
    model, ids = tiny_model(), prompt(140)
    words = {"repeat_ids": (5, 6), "suffix_ids": (7,), "replay_chunk": 50, "level": level}
    configs = [CompressionConfig("kvzip", ratio=ratio, **words) for ratio in (0.25, 0.5, 0.1)]
    for shared, alone in zip(compress_many(model, None, ids, configs), one_by_one(model, configs, ids), strict=True):
        assert_equal(shared, alone)


def test_methods_that_count_attention_share_a_prompt_read_in_one_piece():
    model, ids = tiny_model(), prompt(140)
    configs = [
        settings("snapkv", budget=40),
        settings("h2o", budget=30, chunk_size="prompt"),
        settings("asymkv", budget=50, chunk_size="prompt"),
        settings("criticalkv", budget=40, layer_budgets="global"),
        CompressionConfig("full"),
    ]
    for shared, alone in zip(compress_many(model, None, ids, configs), one_by_one(model, configs, ids), strict=True):
        assert_equal(shared, alone)


def test_a_padded_batch_is_shared_and_goes_on_by_itself():
    model = tiny_model()
    ids, mask, _ = left_padded([90, 140, 60])
    configs = [settings("snapkv", ratio=0.5, decode_interval=4), settings("adakv", ratio=0.3, decode_interval=4)]
    shared, alone = compress_many(model, None, ids, configs, attention_mask=mask), one_by_one(model, configs, ids, mask)
    for config, a, b in zip(configs, shared, alone, strict=True):
        assert_equal(a, b)
        with asymkv.replace("llama", config, model=model), torch.no_grad():
            for step in range(9):
                token = torch.full((3, 1), 11 + step)
                out, expected = (model(token, past_key_values=cache).logits for cache in (a, b))
                assert torch.equal(out, expected)
        assert_equal(a, b)


def test_stored_dimensions_are_shared_where_they_are_equal():
    model, ids = tiny_model(), prompt(140)
    configs = [settings("snapkv", ratio=ratio, dimensions=zack()) for ratio in (0.5, 0.2)]
    for shared, alone in zip(compress_many(model, None, ids, configs), one_by_one(model, configs, ids), strict=True):
        assert_equal(shared, alone)


def test_a_text_is_compressed_once():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    calls, text = [], "some words to keep " * 20
    model.model.register_forward_hook(lambda *_: calls.append(1))
    shared = compress_many(model, tokenizer, text, [settings("snapkv", budget=30), settings("adakv", budget=40)])
    assert len(calls) == 1
    assert_equal(shared[1], compress(model, tokenizer, text, settings("adakv", budget=40)))


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([{"method": "h2o", "budget": 40}], "prefill of its own"),
        ([{"method": "snapkv", "budget": 40, "window_size": 8, "backend": "reference"}], "must be equal"),
        ([{"method": "kvzip", "budget": 40, "repeat_ids": (5,)}], "cannot share"),
    ],
)
def test_settings_that_cannot_share_are_refused_before_anything_runs(others, named, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    configs = [settings("snapkv", budget=40), *(CompressionConfig(**other) for other in others)]
    with pytest.raises(ValueError, match=named):
        compress_many(model, None, prompt(100), configs)
    with pytest.raises(ValueError, match="at least one"):
        compress_many(model, None, prompt(100), [])


def test_cells_of_a_run_are_grouped_by_what_they_can_share():
    from asymkv.longbench.arms import Arm

    def arm(method, **given):
        return Arm(method, settings(method, **given))

    cells = [
        arm("full"),
        arm("h2o", ratio=0.5),
        arm("snapkv", ratio=0.5),
        arm("h2o", ratio=0.2),
        arm("adakv", ratio=0.2),
    ]
    names = [[cell.name for cell in group] for group in share_groups(cells, 200)]
    assert names == [["full"], ["h2o"], ["snapkv", "adakv"], ["h2o"]]
    model = tiny_model()
    subject = Subject(model, None, ModelSpec("tiny", "tiny", 512), frozenset())
    prefixes = prefill_together(subject, [cells[2], cells[4]], prompt(100)[0].tolist())
    for prefix, cell in zip(prefixes, (cells[2], cells[4]), strict=True):
        assert_equal(prefix.cache, compress(model, None, prompt(100), cell.config))
        with cell.applied(model), torch.no_grad():
            assert torch.equal(prefix.last_logits, model(prompt(100), logits_to_keep=1).logits[0, -1])
