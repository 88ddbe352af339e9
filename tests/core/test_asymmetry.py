"""Rank correlation of neighbours: against a plain reference, on planted data, from any model's own states."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, assert_close, prompt, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import asymkv
from asymkv.analysis.asymmetry import (
    STATES,
    Asymmetry,
    correlations,
    cosine_matrix,
    cosines,
    head_numbers,
    measure_asymmetry,
    text_windows,
)
from asymkv.analysis.asymmetry_report import local_share, markdown, strength
from asymkv.analysis.attention_states import ATTENTION, KEYS, KEYS_PRE_ROPE, VALUES, watch_states
from asymkv.analysis.rank_correlation import Triangle, spearman
from asymkv.models import get_adapter
from scripts import plot_asymmetry

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "asymmetry.ipynb"
# Softcapped logits and a sliding window; sink logits; rotary embedding of a part, projections in one; no rotary one.
OTHERS = {
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gpt_oss": {"sliding_window": 16, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}


def other_model(family, **overrides):
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **overrides)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def reference_spearman(pairs):
    """Mean ranks by counting, Pearson by its formula."""
    sides = []
    for values in zip(*pairs, strict=True):
        ranks = [sum(v < u for v in values) + (sum(v == u for v in values) + 1) / 2 for u in values]
        mean = math.fsum(ranks) / len(ranks)
        sides.append([r - mean for r in ranks])
    x, y = sides
    scale = math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / scale


def planted(tokens=200, dim=64, rho=0.9, seed=0):
    """Keys that follow each other (AR(1)), and values and queries that do not."""
    g = torch.Generator().manual_seed(seed)
    noise, values, queries = (torch.randn(tokens, dim, generator=g) for _ in range(3))
    keys = [noise[0]]
    for x in noise[1:]:
        keys.append(rho * keys[-1] + math.sqrt(1 - rho**2) * x)
    return queries, torch.stack(keys), values


def states_of(model, ids):
    seen = {}
    watch_states(model, ids, lambda state, layer, head, x: seen.__setitem__((state, layer, head), x))
    return seen


def stacked(seen, state, layer):
    """``[heads, ...]`` of one layer."""
    return torch.stack([x for (s, n, _), x in seen.items() if (s, n) == (state, layer)])


def window_row(result, state, layer, head, left_out):
    return next(r for r in result.rows if (r["state"], r["layer"], r["head"], r["left_out"]) ==
                (state, layer, head, left_out))  # fmt: skip


@pytest.mark.parametrize("levels", [3, 10**9], ids=["many ties", "no ties"])
def test_spearman_is_the_reference(levels):
    x, y = np.random.default_rng(0).integers(0, levels, (2, 150))
    y = y + x // 2
    expected = reference_spearman(list(zip(x.tolist(), y.tolist(), strict=True)))
    assert spearman(x, y) == pytest.approx(expected, abs=1e-12)


def test_spearman_of_a_textbook_example():
    assert spearman(np.array([1, 2, 3, 4, 5]), np.array([5, 6, 7, 8, 7])) == pytest.approx(0.8207826816681233)


def test_spearman_of_a_constant_is_zero_and_of_nan_an_error():
    x = np.arange(5.0)
    assert spearman(x, np.ones(5)) == spearman(np.ones(5), np.ones(5)) == 0.0
    with pytest.raises(ValueError, match="found NaN"):
        spearman(x, np.array([1, 2, np.nan, 4, 5]))
    with pytest.raises(ValueError, match=r"one length; found shapes \(5,\) and \(4,\)"):
        spearman(x, x[:4])


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("diagonal", [True, False])
def test_pairs_are_those_of_the_causal_triangle(first, diagonal):
    matrix = torch.rand(14, 14, generator=torch.Generator().manual_seed(0)).mul(20).round()
    last = 0 if diagonal else 1
    pairs = [(matrix[i, j].item(), matrix[i, j + 1].item()) for i in range(14) for j in range(first, i - last)]
    found = correlations(matrix, first=first, diagonal=diagonal)
    assert found["spearman"] == pytest.approx(reference_spearman(pairs), abs=1e-12)
    above = matrix + torch.full((14, 14), 1e9).triu(1)
    assert correlations(above, first=first, diagonal=diagonal) == found  # nothing above the diagonal is looked at


def test_whole_triangle_ranks_are_averaged_over_ties_and_correlated_as_pairs():
    matrix = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)).mul(9).round()
    entries = [matrix[i, j].item() for i in range(12) for j in range(i + 1)]
    rank = {v: sum(u < v for u in entries) + (sum(u == v for u in entries) + 1) / 2 for v in entries}
    x, y = zip(*((rank[matrix[i, j].item()], rank[matrix[i, j + 1].item()]) for i in range(12) for j in range(i)),
               strict=True)  # fmt: skip
    expected = np.corrcoef(x, y)[0, 1]
    assert correlations(matrix, first=0, diagonal=True)["pearson_of_ranks"] == pytest.approx(expected, abs=1e-12)


def test_controls_keep_what_they_say():
    rows, columns = torch.meshgrid(torch.arange(150), torch.arange(150), indexing="ij")
    noise = torch.rand(150, 150, generator=torch.Generator().manual_seed(0))
    token = noise[0].expand(150, 150)
    by_row = correlations(1 / (1.0 + rows), first=0, diagonal=True)
    assert by_row["spearman"] == pytest.approx(1) and by_row["row_shuffled"] == pytest.approx(1)
    assert by_row["distance_shuffled"] < 0.6 and by_row["both_shuffled"] > 0.9
    by_distance = correlations(1 / (1.0 + rows - columns), first=0, diagonal=True)
    assert by_distance["distance_shuffled"] == pytest.approx(by_distance["pearson_of_ranks"], abs=1e-12)
    assert by_distance["both_shuffled"] == pytest.approx(by_distance["pearson_of_ranks"], abs=1e-12)
    assert by_distance["spearman"] > 0.99 and by_distance["row_shuffled"] < 0.5
    # Heavy tokens beside heavy tokens, whatever the row and the distance.
    smooth = torch.nn.functional.avg_pool1d(token, 5, 1, 2)
    by_token = correlations(smooth, first=0, diagonal=True)
    assert by_token["spearman"] > 0.7
    assert max(abs(by_token[c]) for c in ("row_shuffled", "distance_shuffled", "both_shuffled")) < 0.25
    by_chance = correlations(noise, first=0, diagonal=True)
    assert max(abs(v) for v in by_chance.values()) < 0.05


def test_planted_keys_and_values_come_in_the_expected_order():
    queries, keys, values = planted()
    logits = (queries @ keys.T / 8).masked_fill(torch.ones(200, 200).triu(1).bool(), -torch.inf)
    seen = {ATTENTION: logits.softmax(-1), KEYS: keys, VALUES: values}
    found = {state: head_numbers(state, x, left_out=4) for state, x in seen.items()}
    assert found[KEYS]["spearman"] > 0.7 and found[ATTENTION]["spearman"] > 0.7
    assert abs(found[VALUES]["spearman"]) < 0.05 and abs(found[VALUES]["adjacent_cosine"]) < 0.05
    assert found[KEYS]["adjacent_cosine"] == pytest.approx(0.9, abs=0.03)
    assert found[KEYS]["cosine_lag_4"] == pytest.approx(0.9**4, abs=0.08)
    assert found[KEYS]["row_shuffled"] < 0.3 and abs(found[VALUES]["row_shuffled"]) < 0.05


@pytest.mark.parametrize("state", [KEYS, VALUES])
@pytest.mark.parametrize("scale", [0.0, 1.0], ids=["zeros", "equal"])
def test_equal_vectors_have_no_correlation_and_no_nan(state, scale):
    rows = scale * torch.randn(1, 48, generator=torch.Generator().manual_seed(0)).expand(100, 48)
    found = head_numbers(state, rows, left_out=4)
    assert {found[name] for name in ("spearman", "pearson_of_ranks", "row_shuffled", "both_shuffled")} == {0.0}
    assert found["adjacent_cosine"] == pytest.approx(scale) and found["any_pair_cosine"] == pytest.approx(scale)
    row = {"state": state, "layer": 0, "head": 0, "left_out": 4, **found}
    assert abs(local_share(Asymmetry([row], [100], 4), state).item()) < 1e-6


def test_equal_attention_is_all_rank_of_rows():
    found = head_numbers(ATTENTION, torch.ones(60, 60).tril() / torch.arange(1, 61)[:, None])
    assert found["spearman"] == pytest.approx(1) and found["row_shuffled"] == pytest.approx(1)
    assert found["distance_shuffled"] < 0.7


def test_cosines_are_those_of_pairs():
    rows = planted(tokens=30, dim=8)[1]
    unit = [r / r.norm() for r in rows.double()]
    adjacent = torch.stack([a @ b for a, b in zip(unit, unit[1:], strict=False)])
    found = cosines(rows, max_lag=3)
    every = torch.stack([unit[i] @ unit[j] for i in range(30) for j in range(i)])
    third = torch.stack([a @ b for a, b in zip(unit, unit[3:], strict=False)])
    assert found["adjacent_cosine"] == found["cosine_lag_1"] == pytest.approx(adjacent.mean().item(), abs=1e-12)
    assert found["adjacent_cosine_variance"] == pytest.approx(adjacent.var(correction=0).item(), abs=1e-12)
    assert found["any_pair_cosine"] == pytest.approx(every.mean().item(), abs=1e-12)
    assert found["cosine_lag_3"] == pytest.approx(third.mean().item(), abs=1e-12)
    assert_close("matrix", torch.stack(unit) @ torch.stack(unit).T, cosine_matrix(rows), 1e-5)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(OTHERS)))
def test_states_are_the_models_own(family):
    model, ids = tiny_model(family), prompt(40)
    seen, before = states_of(model, ids[0]), model.config._attn_implementation
    hidden = []
    adapter = get_adapter(family)
    handles = [m.register_forward_pre_hook(lambda m, a, k: hidden.append(k["hidden_states"]), with_kwargs=True)
               for m in model.modules() if isinstance(m, adapter.attention_class())]  # fmt: skip
    model.set_attn_implementation("eager")
    with torch.no_grad():
        stock = model(ids, past_key_values=DynamicCache(), output_attentions=True)
    for handle in handles:
        handle.remove()
    for layer in range(2):
        attention = model.model.layers[layer].self_attn
        expected = {ATTENTION: stock.attentions[layer][0], KEYS: stock.past_key_values.layers[layer].keys[0],
                    VALUES: stock.past_key_values.layers[layer].values[0],
                    KEYS_PRE_ROPE: adapter.project(attention, hidden[layer])[1][0].detach()}  # fmt: skip
        for state, x in expected.items():
            assert_close(f"layer {layer} {state}", x, stacked(seen, state, layer), 1e-5)
    assert before == "sdpa" and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", OTHERS)
def test_any_decoder_of_transformers_can_be_observed(family):
    model, ids = other_model(family, **OTHERS[family]), prompt(40)
    seen = states_of(model, ids[0])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        stock = model(ids, output_attentions=True, use_cache=False)
    for layer, weights in enumerate(stock.attentions):
        assert_close(f"layer {layer}", weights[0], stacked(seen, ATTENTION, layer), 1e-5)
    names = {state for state, _, _ in seen}
    assert names == (set(STATES) - {KEYS_PRE_ROPE} if family == "gpt2" else set(STATES))
    if family == "gpt_neox":  # position 0 is not turned, later ones are in the rotary quarter of the dimensions alone
        turned = (stacked(seen, KEYS, 0) - stacked(seen, KEYS_PRE_ROPE, 0)).abs().amax(0)
        assert turned[0].max() < 1e-6 and turned[9, :4].min() > 0 and turned[9, 4:].max() == 0


def test_patched_model_shows_the_same_states():
    model, ids = tiny_model(), prompt(40)[0]
    plain = states_of(model, ids)
    with asymkv.replace("llama", model=model, budget=64):
        patched = states_of(model, ids)
    assert plain.keys() == patched.keys() and all(torch.equal(x, patched[k]) for k, x in plain.items())


def test_model_is_as_before_after_an_error():
    model = tiny_model()

    def fail(*args):
        raise RuntimeError("seen enough")

    with pytest.raises(RuntimeError, match="seen enough"):
        watch_states(model, prompt(20)[0], fail)
    assert model.config._attn_implementation == "sdpa" and not any(m._forward_pre_hooks for m in model.modules())


def test_model_without_the_interface_is_refused():
    with pytest.raises(ValueError, match=r"BloomForCausalLM \(bloom\) does not use transformers' attention interface"):
        watch_states(other_model("bloom", n_layer=2, n_head=4), prompt(20)[0], lambda *_: None)


def test_measurement_counts_heads_of_groups_and_averages_windows():
    model = tiny_model("qwen2")
    windows = list(prompt(48, batch=2))
    layers = []
    result = measure_asymmetry(model, windows, max_lag=4, progress=layers.append)
    alone = [measure_asymmetry(model, [w], max_lag=4) for w in windows]
    assert layers == [0, 1, 0, 1] and result.states == list(STATES) and result.lengths == [48, 48]
    assert result.table(ATTENTION, "spearman").shape == (2, 4) and result.table(VALUES, "spearman").shape == (2, 2)
    assert len(result.rows) == 2 * 2 * (4 + 3 * 2)
    for state in STATES:
        for left_out in (0, 4):
            tables = torch.stack([r.table(state, "spearman", left_out) for r in alone])
            assert_close(state, tables.mean(0), result.table(state, "spearman", left_out), 1e-12)
            spread = tables.std(0, correction=0)
            assert_close(state, spread, result.table(state, "spearman_window_sd", left_out), 1e-9)
    seen = states_of(model, windows[0])
    expected = head_numbers(KEYS, seen[KEYS, 1, 1], left_out=4, max_lag=4)
    assert window_row(alone[0], KEYS, 1, 1, 4).items() >= expected.items()


def test_what_cannot_be_measured_or_found_is_named():
    model = tiny_model()
    for windows in ([], [prompt(21)[0]]):
        with pytest.raises(ValueError, match="at least 22 tokens; found lengths"):
            measure_asymmetry(model, windows)
    result = measure_asymmetry(model, [prompt(30)[0]], max_lag=2)
    with pytest.raises(ValueError, match=r"no rows of 'queries' with 4 tokens left out; measured: .*\[0, 4\]"):
        result.table("queries", "spearman")
    with pytest.raises(ValueError, match="attention has no 'adjacent_cosine'; allowed: .*spearman"):
        result.table(ATTENTION, "adjacent_cosine")
    with pytest.raises(ValueError, match="no pair of neighbours among 5 tokens without the first 4"):
        Triangle(5, first=4)
    with pytest.raises(ValueError, match="must be finite"):
        correlations(torch.full((9, 9), torch.nan), first=0, diagonal=True)


def test_windows_begin_as_texts_do():
    tokenizer = tiny_tokenizer()
    text = " ".join(f"w{i}" for i in range(100))
    plain = text_windows(tokenizer, text, tokens=30, windows=9)
    assert [w.tolist() for w in plain] == [list(range(3 + s, 33 + s)) for s in (0, 30, 60)]
    tokenizer.bos_token = "<s>"
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    begun = text_windows(tokenizer, text, tokens=30, windows=2)
    assert [w.tolist() for w in begun] == [[1, *range(3, 32)], [1, *range(32, 61)]]
    with pytest.raises(ValueError, match="a window takes 149 tokens of the text; it has 100"):
        text_windows(tokenizer, text, tokens=150, windows=1)


def test_words_for_correlations():
    assert [strength(x) for x in (0.85, 0.7, 0.2, 0.1, -0.1)] == ["very strong", "strong", "weak", *["very weak"] * 2]
    assert strength(-0.5) == "moderate, negative"


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 100}" for i in range(200)))
    return tmp_path


def test_script_writes_tables_figures_and_conditions(checkpoint, capsys):
    arguments = ["--model", str(checkpoint / "model"), "--text-file", str(checkpoint / "text.txt"), "--tokens", "64"]
    assert plot_asymmetry.main([*arguments, "--windows", "2", "--out", str(checkpoint / "out")]) == 0
    done = capsys.readouterr()
    out = checkpoint / "out"
    assert {p.name for p in out.iterdir()} == {"heads.csv", "lags.csv", "asymmetry.md", "run.json", "heatmaps.png",
                                               "distributions.png", "lags.png"}  # fmt: skip
    rows = list(csv.DictReader((out / "heads.csv").open()))
    means = [float(r["spearman"]) for r in rows if (r["state"], r["left_out"]) == ("attention", "4")]
    assert len(means) == 8 and len(list(csv.DictReader((out / "lags.csv").open()))) == 3 * 4
    text = (out / "asymmetry.md").read_text()
    assert text in done.out and "4/4" in done.err  # layers x windows of the progress bar
    stated = float(re.search(r"\*\*attention weights\*\*: .*?mean (-?[\d.]+) over 8 heads", text).group(1))
    assert stated == pytest.approx(sum(means) / 8, abs=6e-4)
    run = json.loads((out / "run.json").read_text())
    assert run["windows"] == 2 and run["tokens of a window"] == 64 and len(run["text_sha256"]) == 64


def test_report_without_rope_and_without_a_second_reading():
    result = measure_asymmetry(other_model("gpt2", **OTHERS["gpt2"]), [prompt(40)[0]], sink_size=0, max_lag=4)
    text = markdown(result, {"model": "tiny"})
    assert "keys before RoPE" not in text and not re.search(r"\bnan\b", text)
    assert text.count("| attention weights | 0 | 8 |") == 1 and "| attention weights | 4 |" not in text


def test_notebook_runs_from_top_to_bottom(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert 6 <= len(cells) <= 12 and all(len(json.dumps(c["outputs"])) < 100_000 for c in code)
    names = {}
    for cell in code:
        source = "".join(line for line in cell["source"] if not line.startswith("%"))
        exec(compile(source, str(NOTEBOOK), "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names.update(MODEL=str(checkpoint / "model"), TEXT_FILE=checkpoint / "text.txt", TOKENS=64, WINDOWS=2)
    assert names["result"].lengths == [64, 64] and "**values, cosine**" in capsys.readouterr().out


@pytest.mark.parametrize(("setting", "least"), [({"sink_size": -1}, 0), ({"max_lag": 0}, 1)])
def test_settings_below_their_least_are_refused(setting, least):
    with pytest.raises(ValueError, match=rf"must be an integer >= {least}; found"):
        measure_asymmetry(tiny_model(), [prompt(30)[0]], **setting)
