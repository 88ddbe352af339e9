"""Presses as arms: how they are written, what they may store, and calls that go on from a pressed cache.

The presses here are written for the tests in kvpress's form; kvpress itself runs in test_kvpress_worker.py.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from tiny_models import prompt, tiny_model

from asymkv.longbench import peers, retention
from asymkv.longbench.arms import FULL, StoredTooMuchError, full_cache_bytes, make_arms, parse_settings
from asymkv.longbench.data import Task
from asymkv.longbench.measure import Protocol, Subject, measure
from asymkv.longbench.models import ModelSpec
from asymkv.longbench.press_arms import PressArm, PressError, PressSpec
from asymkv.longbench.pressed import PressedCache, attentions, press_together, pressed

PROMPT, REST = prompt(60)[0].tolist(), prompt(20, seed=5)[0].tolist()


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("SnapKVPress", {"press": "SnapKVPress"}),
        ("AdaKVPress(SnapKVPress)", {"press": "AdaKVPress", "base": {"press": "SnapKVPress"}}),
        ("A(B(C))", {"press": "A", "base": {"press": "B", "base": {"press": "C"}}}),
    ],
)
def test_a_press_is_written_as_a_name_or_a_mapping(text, table):
    spec = PressSpec.parse(text)
    assert spec == PressSpec.from_mapping(table)
    assert spec.to_mapping() == table and spec.label == text


@pytest.mark.parametrize("text", ["", "A(", "A()", "A(B)C", "A B"])
def test_other_text_is_refused(text):
    with pytest.raises(PressError, match="Name or Name"):
        PressSpec.parse(text)


@pytest.mark.parametrize("table", [{"base": {"press": "A"}}, {"press": 3}, {"press": "A", "base": "B"}])
def test_other_mappings_are_refused(table):
    with pytest.raises(PressError, match="press: <class name>"):
        PressSpec.from_mapping(table)


def test_the_command_line_makes_press_arms():
    settings = parse_settings(["window_size=8", "kvpress_SnapKVPress.window_size=16"])
    names = ["full", "h2o", "kvpress:SnapKVPress", "kvpress:AdaKVPress(SnapKVPress)"]
    _, h2o, snap, ada = make_arms(names, ratio=0.25, settings=settings)
    assert h2o.config.window_size == 8
    assert snap == PressArm("kvpress_SnapKVPress", PressSpec("SnapKVPress", {"window_size": 16}), 0.25)
    assert ada.name == "kvpress_AdaKVPress_SnapKVPress" and ada.press.base == PressSpec("SnapKVPress")
    assert ada.settings() == {"press": "AdaKVPress", "base": {"press": "SnapKVPress"}, "ratio": 0.25, "budget": None}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({}, "a ratio, or a budget"),
        ({"ratio": 1.5}, "ratio must be"),
        ({"budget": 0}, "rows per KV head .* or bytes"),
        ({"budget": "1 row"}, "not a size"),
    ],
)
def test_a_press_takes_a_ratio_rows_or_bytes(size, message):
    with pytest.raises(ValueError, match=message):
        PressArm("a", PressSpec("KnormPress"), **size)
    arm = PressArm("a", PressSpec("KnormPress"), budget=30)
    assert (arm.share(60), arm.share(20)) == (0.5, 1.0)


@torch.no_grad()
def test_a_budget_in_bytes_is_a_share_of_the_stock_cache(lm, press):
    """Of 100 tokens, what takes a quarter of their bytes; a press that leaves more is refused."""
    limit = full_cache_bytes(lm, 100) // 4
    arm, tokens = PressArm("a", PressSpec("X"), budget=f"{limit}B"), prompt(100)[0].tolist()
    assert arm.share(100, full_cache_bytes(lm, 1)) == pytest.approx(0.25, abs=1e-3)
    for kept, fails in ((25, False), (60, True)):
        with press(lm, KeepLast(kept, kept)):
            cache = retention.compress(lm, tokens).cache
        assert (cache.nbytes <= limit) == (not fails)
        with pytest.raises(StoredTooMuchError, match="a share of 0.25") if fails else contextlib.nullcontext():
            arm.check(cache, len(tokens), 0)


class KeepLast:
    """Removes all but the last rows, by layer as many as ``counts`` says, in a hook as kvpress does."""

    def __init__(self, *counts):
        self.counts = counts

    @contextlib.contextmanager
    def __call__(self, model):
        hooks = [a.register_forward_hook(self.hook, with_kwargs=True) for a in attentions(model)]
        yield
        for hook in hooks:
            hook.remove()

    def hook(self, module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        kept = self.counts[module.layer_idx]
        layer.keys, layer.values = (x[:, :, -kept:].contiguous() for x in (layer.keys, layer.values))


class Hide(KeepLast):
    """Hides what KeepLast would remove, but in the second KV head only; leaves all rows where they are."""

    def hook(self, module, args, kwargs, output):
        gone = kwargs["past_key_values"].layers[module.layer_idx].keys.shape[2] - self.counts[module.layer_idx]
        module.masked_key_indices = torch.zeros(gone, dtype=int), torch.ones(gone, dtype=int), torch.arange(gone)


@pytest.fixture
def lm():
    return tiny_model()


@pytest.fixture
def press(monkeypatch):
    """Applies a press of this file where the worker applies one of kvpress."""
    import sys
    from types import SimpleNamespace

    fake = SimpleNamespace(pressing=lambda model, press, ids: press(model), moves_keys=lambda press: False)
    monkeypatch.setitem(sys.modules, "asymkv.longbench.presses", fake)
    monkeypatch.setattr("asymkv.longbench.presses", fake, raising=False)
    return lambda model, press: pressed(model, lambda tokens: press)


def masked_logits(model, kept):
    """Logits of REST where a head of a layer sees only its last rows of PROMPT: one call, with a mask of our own."""

    def hook(module, args, kwargs):
        closed = torch.ones(len(PROMPT + REST), len(PROMPT + REST), dtype=bool).triu(1).repeat(4, 1, 1)
        for head in range(4):
            gone = len(PROMPT) - kept[module.layer_idx][head // 2]
            closed[head, len(PROMPT) :, :gone] = True
        return args, {**kwargs, "attention_mask": torch.zeros(closed.shape).masked_fill(closed, -torch.inf)[None]}

    hooks = [a.register_forward_pre_hook(hook, with_kwargs=True) for a in attentions(model)]
    out = model(torch.tensor([PROMPT + REST])).logits[0, len(PROMPT) :]
    for hook in hooks:
        hook.remove()
    return out


PRESSED = [
    (KeepLast(60, 60), ((60, 60), (60, 60))),
    (KeepLast(30, 12), ((30, 30), (12, 12))),
    (Hide(30, 12), ((60, 30), (60, 12))),
]


@torch.no_grad()
@pytest.mark.parametrize("steps", [len(REST), 1])
@pytest.mark.parametrize(("made", "kept"), PRESSED)
def test_what_follows_sees_the_rows_that_are_left_at_their_positions(lm, press, made, kept, steps):
    expected = masked_logits(lm, kept)
    with press(lm, made):
        cache = retention.compress(lm, PROMPT).cache
        parts = [REST[i : i + steps] for i in range(0, len(REST), steps)]
        found = [lm(torch.tensor([part]), past_key_values=cache).logits[0] for part in parts]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)
    assert cache.tokens_seen == len(PROMPT + REST)


@torch.no_grad()
def test_without_a_press_it_is_the_full_cache(lm):
    expected = lm(torch.tensor([PROMPT + REST])).logits[0, len(PROMPT) - 1 : -1]
    arm = PressArm(FULL)
    with arm.applied(lm):
        prefix = retention.compress(lm, PROMPT)
        arm.check(prefix.cache, len(PROMPT), 0)
        found = retention.answer_nll(lm, prefix, [], REST)
    assert found == pytest.approx(retention.mean_nll(expected, REST), abs=1e-5)
    with pytest.raises(StoredTooMuchError, match="holds 60 rows after 50 tokens"):
        arm.check(prefix.cache, 50, 0)


def test_two_environments_must_lose_the_same_with_the_full_cache(lm, tokenizer):
    lm = tiny_model(vocab_size=len(tokenizer))
    subject = Subject(lm, tokenizer, ModelSpec("tiny", "tiny", 500, chat_template=False), frozenset())
    row, task = {"_id": "a", "context": "abc " * 9, "answers": ["yes"]}, Task("qasper", "Read {context}", 5)
    with make_arms(["full"])[0].applied(lm):
        expected = measure(subject, make_arms(["full"])[0], task, row, Protocol("context"))["nll"]
    found = peers.compare_full(subject, task, row, Protocol("context"), expected)
    assert found["found"] == pytest.approx(expected, abs=1e-4) and found["id"] == "a"
    with pytest.raises(PressError, match=r"the full cache loses \S+ on row a here"):
        peers.compare_full(subject, task, row, Protocol("context"), expected + 0.1)


@torch.no_grad()
def test_rows_that_are_hidden_are_charged_and_rows_that_are_removed_are_not(lm, press):
    arm = PressArm("a", PressSpec("X"), 0.5)
    stored = {}
    for made in (KeepLast(30, 12), Hide(30, 12)):
        with press(lm, made):
            cache = retention.compress(lm, PROMPT).cache
            stored[type(made)] = arm.stored(cache, lm)
    removed, hidden = stored.values()
    assert (removed["rows_min"], removed["rows_max"], removed["peak_rows"]) == (12, 30, 60)
    assert removed["stored_bytes"] == removed["full_bytes"] * 42 / 120
    assert removed["nominal_ratio"] == removed["kept_ratio"] == 42 / 120
    # The first layer is already cut when the second one is full.
    assert removed["peak_bytes"] == removed["full_bytes"] * 90 / 120
    assert hidden["stored_bytes"] == hidden["full_bytes"] == hidden["peak_bytes"]
    assert hidden["kept_ratio"] == 1.0 and hidden["nominal_ratio"] == (60 + 30 + 60 + 12) / 240


@torch.no_grad()
def test_a_press_that_removes_nothing_is_refused(lm, press):
    arm, tokens = PressArm("lazy", PressSpec("X"), 0.25), prompt(100)[0].tolist()
    for kept, fails in ((25, False), (48, False), (100, True)):
        with press(lm, KeepLast(kept, kept)):
            cache = retention.compress(lm, tokens).cache
        if fails:
            with pytest.raises(StoredTooMuchError, match="lazy shows attention 100 rows"):
                arm.check(cache, len(tokens), 0)
        else:
            arm.check(cache, len(tokens), 0)


@torch.no_grad()
def test_scoring_changes_neither_the_cache_nor_the_model(lm, press):
    before = lm(torch.tensor([PROMPT])).logits
    with press(lm, Hide(30, 12)):
        prefix = retention.compress(lm, PROMPT)
        first = retention.answer_nll(lm, prefix, REST, PROMPT[:5])
        assert prefix.cache.rows() == [60, 60] and prefix.cache.tokens_seen == 60
        assert retention.answer_nll(lm, prefix, REST, PROMPT[:5]) == first
    with press(lm, KeepLast(60, 60)):
        assert retention.compress(lm, PROMPT).cache.hidden == {}
    assert "forward" not in vars(lm) and not any(a._forward_pre_hooks for a in attentions(lm))
    assert not any(a.masked_key_indices for a in attentions(lm))
    assert torch.equal(lm(torch.tensor([PROMPT])).logits, before)


@torch.no_grad()
def test_a_press_that_fails_in_a_shared_prefill_takes_no_other_with_it(lm, press):
    """Before the model runs, or in its second layer; what the others are given is what they leave alone."""
    good, hiding, late, early = presses = KeepLast(30, 12), Hide(30, 12), KeepLast(30), KeepLast(30, 12)
    for each in presses:
        each.forward_hook, each.post_init_from_model = each.hook, lambda model: None
    early.post_init_from_model = None  # cannot be called
    caches, logits = press_together(lm, presses, [False] * 4, torch.tensor([PROMPT]))
    assert caches[2:] == [None, None]
    for made, cache in zip((good, hiding), caches, strict=False):
        with press(lm, made):
            alone = retention.compress(lm, PROMPT)
        assert cache.settled and cache.tokens_seen == cache.next_position == len(PROMPT)
        assert (cache.peak_rows, cache.peak_nbytes) == (alone.cache.peak_rows, alone.cache.peak_nbytes)
        assert cache.hidden.keys() == alone.cache.hidden.keys() and torch.equal(logits, alone.last_logits)
        for layer, expected in zip(cache.layers, alone.cache.layers, strict=True):
            assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)
        assert all(torch.equal(hidden, alone.cache.hidden[i]) for i, hidden in cache.hidden.items())
    assert not any(a._forward_hooks or a.masked_key_indices for a in attentions(lm))


def test_an_empty_cache_takes_no_room():
    assert PressedCache().nbytes == 0 and PressedCache().rows() == []


@pytest.mark.parametrize("where", ["folder", "install"])
def test_without_kvpress_the_error_says_what_to_do(monkeypatch, tmp_path, where):
    if where == "folder":
        monkeypatch.setenv(peers.ENV, str(tmp_path))
        message = "holds no kvpress; install it there: pip install"
    else:
        monkeypatch.delenv(peers.ENV, raising=False)
        monkeypatch.setattr(peers, "PINS", ("./no-such-folder-to-install",))
        monkeypatch.setattr(peers, "overlay_path", lambda: tmp_path / "kvpress")
        message = "could not be installed .*make kvpress"
    with pytest.raises(PressError, match=message):
        peers.overlay()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_is_an_error_with_its_message(monkeypatch, tmp_path):
    (tmp_path / "kvpress").mkdir()
    monkeypatch.setenv(peers.ENV, str(tmp_path))
    for body, message in (
        ("raise SystemExit(3)", "exit code 3 and left no message"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("print('noise')", "left no message"),
        ("import json; print(json.dumps({'error': 'no such row'})); raise SystemExit(1)", "failed: no such row"),
    ):
        (tmp_path / "script.py").write_text(body, encoding="utf-8")
        with pytest.raises(PressError, match=message):
            peers.start_worker(tmp_path / "script.py", [])
    (tmp_path / "script.py").write_text("import sys; print('{\"answer\": %d}' % len(sys.argv))", encoding="utf-8")
    assert peers.start_worker(tmp_path / "script.py", ["--a", "b"]) == 4


def test_a_worker_says_what_went_wrong(capsys):
    peers.answer(lambda: {"arm": "why"})
    with pytest.raises(SystemExit):
        peers.answer(lambda: 1 / 0)
    said = capsys.readouterr()
    assert said.out.splitlines() == ['{"answer": {"arm": "why"}}', '{"error": "ZeroDivisionError: division by zero"}']
    assert "Traceback" in said.err


def test_a_worker_whose_caller_is_gone_stops(monkeypatch):
    peers.stop_if_orphaned()
    monkeypatch.setenv(peers.CALLER, "1000000000")
    with pytest.raises(SystemExit, match="has ended"):
        peers.stop_if_orphaned()
