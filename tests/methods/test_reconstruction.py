"""A replay scores rows as a plain restatement of KVzip does, whatever is stored, and leaves nothing behind."""

import pytest
import torch
from tiny_models import assert_close, left_padded, prompt, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import asymkv
from asymkv.models import get_adapter
from asymkv.reconstruction import Reconstruction, replay
from asymkv.replay_scores import KEPT, SCORE, RangeMaximum

REQUEST = {"repeat_ids": (5, 90, 17), "continue_ids": (5, 91), "suffix_ids": (33, 34)}


def attention_inputs(model, ids):
    """Hidden states that each layer's attention projects, ``[t, hidden]`` each."""
    seen = []
    hooks = [layer.self_attn.register_forward_pre_hook(lambda m, args, kw: seen.append(kw["hidden_states"][0]),
                                                       with_kwargs=True) for layer in model.model.layers]  # fmt: skip
    model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def restated_scores(model, ids, begin, end, inputs, anchor, plus):
    """KVzip's score of positions ``begin ... end`` for one replay, ``[L, H_kv, end - begin]``, one query at a time."""
    out = []
    tokens = torch.cat([ids, torch.tensor(inputs), ids[begin:end]])
    subset = [j for j in range(len(ids)) if j < anchor or begin <= j < end]
    for layer, hidden in zip(model.model.layers, attention_inputs(model, tokens), strict=True):
        attn = layer.self_attn
        q, k, v = (p(hidden).view(len(tokens), -1, 16).transpose(0, 1) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        cos, sin = model.model.rotary_emb(hidden, torch.arange(len(tokens))[None])
        q, k = (x[0] for x in apply_rotary_pos_emb(q[None], k[None], cos, sin))
        best = torch.zeros(2, len(subset), dtype=q.dtype)
        for head in range(4):
            group = head // 2
            norms = (v[group, subset] @ attn.o_proj.weight[:, head * 16 : head * 16 + 16].T).norm(dim=-1)
            for i in range(len(ids), len(tokens)):
                keys = torch.cat([k[group, subset], k[group, len(ids) : i + 1]])
                p = (keys @ q[head, i] / 4).softmax(0)[: len(subset)]
                if plus:
                    p = p * norms / hidden[i].norm()
                best[group] = best[group].maximum(p)
        out.append(best[:, [subset.index(j) for j in range(begin, end)]])
    return torch.stack(out)


def restated(model, ids, *, size, prefix=0, anchor=4, plus=False):
    """The same for a whole prompt in ranges, ``[L, H_kv, t]``, 0 in the prefix."""
    scores = torch.zeros(2, 2, len(ids), dtype=model.dtype)
    for begin in range(prefix, len(ids), size):
        end = min(begin + size, len(ids))
        words = list(REQUEST["repeat_ids"])
        if begin > prefix:
            words = [*REQUEST["continue_ids"], *ids[max(begin - 8, prefix) : begin].tolist()]
        inputs = [*words, *REQUEST["suffix_ids"]]
        scores[:, :, begin:end] = restated_scores(model, ids, begin, end, inputs, anchor, plus)
    return scores


def stored_scores(cache, row=0):
    """``[L, H_kv, t]`` of a cache that lost nothing."""
    return torch.stack([layer.dense(SCORE)[row] for layer in cache.layers])


@pytest.mark.parametrize("settings", [{"size": 60}, {"size": 25}, {"size": 25, "prefix": 11, "anchor": 11},
                                      {"size": 30, "plus": True}], ids=str)  # fmt: skip
@torch.no_grad()
def test_scores_are_those_of_a_plain_restatement(settings):
    model = tiny_model(dtype=torch.float64)
    ids = prompt(60)
    ref = restated(model, ids[0], **settings)
    options = {"replay_chunk": settings["size"], "prefix": settings.get("prefix"), "plus": settings.get("plus", False)}
    with asymkv.replace("llama", method="kvzip", retain=True, **options, **REQUEST):
        scores = stored_scores(model(ids).past_key_values)
    prefix = settings.get("prefix", 0)
    assert (scores[..., :prefix] == KEPT).all()
    assert_close("scores", ref[..., prefix:], scores[..., prefix:], 1e-6)
    assert scores[..., prefix:].min() >= 0 and (options["plus"] or scores.max() <= 1)


@pytest.mark.parametrize("ratio", [0.5, 0.25])
@torch.no_grad()
def test_kvpress_settings_keep_what_its_rule_keeps(ratio):
    """Four sinks stay, the rest of the prefix has score 0, and the lowest of all layers and heads go."""
    model = tiny_model(dtype=torch.float64)
    ids = prompt(75)
    ref = restated(model, ids[0], size=40, prefix=9)
    ref[:, :, :4] = ref.amax() + 1
    gone = ref.flatten().argsort(stable=True)[: int(ref.numel() * (1 - ratio))]
    keep = torch.ones(ref.numel(), dtype=torch.bool).index_fill_(0, gone, False).view_as(ref)
    with asymkv.replace("llama", "kvpress_kvzip", ratio=ratio, prefix=9, replay_chunk=40, **REQUEST):
        cache = model(ids).past_key_values
    for layer in range(2):
        for head, found in enumerate(cache.positions(layer)[0]):
            assert found.tolist() == keep[layer, head].nonzero()[:, 0].tolist()


def replayed_outputs(model, run):
    """What the decoder's last norm gave in ``run()``."""
    seen = []
    hook = model.model.norm.register_forward_hook(lambda m, args, out: seen.append(out))
    run()
    hook.remove()
    return seen[-1]


@pytest.mark.parametrize("past", [
    {"method": "full"}, {"method": "asymkv", "chunk_size": 30}, {"method": "streaming_llm", "chunk_size": 30},
    {"method": "h2o", "chunk_size": 30, "head_budgets": "adaptive"},
], ids=lambda p: p["method"])  # fmt: skip
@torch.no_grad()
def test_a_replay_attends_to_everything_stored_and_stores_nothing(past):
    """On a compressed past too, and batched: rows of unequal length, one without a range."""
    model = tiny_model(dtype=torch.float64)
    ids, mask, _ = left_padded([90, 70, 40])
    asked = [prompt(25, seed=3)[0], prompt(12, seed=4)[0], prompt(25, seed=3)[0, :0]]
    with asymkv.replace("llama", window_size=8, **({} if past["method"] == "full" else {"budget": 45}), **past):
        cache = model(ids, attention_mask=mask).past_key_values
        before = cache.fork()
        ranges = [(80, 90), (50, 70), (0, 0)]
        adapter, scorer = get_adapter("llama"), RangeMaximum(4)
        out = replayed_outputs(model, lambda: replay(adapter, model, cache, asked, ranges, scorer))
        for row in range(2):
            alone = before.fork()
            alone.batch_select_indices(torch.tensor([row]))
            alone.config = asymkv.CompressionConfig("full", position_policy=cache.config.positions)
            ref = replayed_outputs(model, lambda a=alone, r=row: model(asked[r][None], past_key_values=a))
            assert_close("replay", ref[0], out[row, : len(asked[row])], 1e-6)
    assert cache.tokens_seen.tolist() == before.tokens_seen.tolist() and cache.nbytes > before.nbytes
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert all(torch.equal(layer.dense(n), old.dense(n)) for n in ("keys", "values", "position", "cardinality"))
        score, position = layer.dense(SCORE), layer.dense("position")
        for row, (begin, end) in enumerate(ranges):
            here = layer.view(cache.rope, 1.0).valid[row]
            inside = (position[row] >= begin) & (position[row] < end) & here
            assert ((score[row] > 0) == inside).all() and (score[row] <= 1).all()


@torch.no_grad()
def test_ranges_may_follow_prefill_chunks():
    """Chunk by chunk as soon as each is in: the same ranges are asked for with the same words."""
    model = tiny_model(dtype=torch.float64)
    ids = prompt(60)
    config = asymkv.CompressionConfig("kvzip", retain=True, prefix=7, replay_chunk=20, **REQUEST)
    with asymkv.replace("llama", method="full") as handle:
        cache = handle.new_cache(model)
        cache.config = config
        seen = []
        rebuild = Reconstruction.of(handle.adapter, model, cache, ids, [60])
        for begin, end in ((0, 27), (27, 60)):
            cache.config = handle.config
            model(ids[:, begin:end], past_key_values=cache)
            cache.config = config
            rebuild.run([end - begin], begin)
            seen.append((stored_scores(cache)[0, 0] > 0).nonzero()[:, 0].tolist())
    assert seen == [list(range(7, 27)), list(range(7, 60))]


class LargestResult(TorchDispatchMode):
    """Elements of the largest floating tensor that an operator made, columns of the cache aside."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, torch.Tensor) and out.is_floating_point() and not func.is_view
        if made and func.overloadpacket not in (torch.ops.aten.index_put_, torch.ops.aten.full):
            self.largest = max(self.largest, out.numel())
        return out


@torch.no_grad()
def test_memory_of_scoring_does_not_grow_with_the_context(monkeypatch):
    model, original = tiny_model(), RangeMaximum.score
    found = {}
    for length in (200, 1600):
        watch = LargestResult()

        def score(*args, watch=watch):
            with watch:
                return original(*args)

        monkeypatch.setattr(RangeMaximum, "score", score)
        with asymkv.replace("llama", method="kvzip", retain=True, replay_chunk=100, **REQUEST):
            model(prompt(length))
        found[length] = watch.largest
    assert 0 < found[200] == found[1600]
