"""What the comparison runs on: checkpoints of this very model, files that have not changed, windows that can be had."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from asymkv.experiments import report
from asymkv.experiments.arms import Sizes, ablation_arms, method_arms
from asymkv.experiments.checkpoint import FINAL, Checkpoint, load_weights
from asymkv.experiments.corpus import Article
from asymkv.experiments.suite import Options, run_suite
from asymkv.experiments.tasks import article_room, summarise
from asymkv.fingerprint import fingerprint
from asymkv.longbench.measure import Subject
from asymkv.longbench.models import ModelSpec, load_model, load_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIZES = Sizes(budget=48, stride=32)
DISTILLED = {"method": "h2o", "defaults": {"window_size": 16}, "steps": [{"name": "trained", "distilled": True}]}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"line {i * i % 977} says {i % 31};" for i in range(40)))  # some 600 tokens
    return path


def options_for(tiny_folder, text_file, out, **extra) -> Options:
    given = {"lengths": (64,), "ablation_lengths": (64,), "samples": 1, "decode_steps": 0, **extra}
    return Options(model=str(tiny_folder), out=out, text=str(text_file), **given)


def spec_of(folder) -> ModelSpec:
    return ModelSpec("tiny", str(folder), 2048)


def saved(folder, **config) -> Path:
    """A model of the tiny folder's sizes, but for some."""
    same = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 260}
    tiny_model("llama", **{**same, **config}).save_pretrained(folder)
    return folder


# -- checkpoints -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [{"num_hidden_layers": 3}, {"hidden_size": 64}, {"vocab_size": 50}], ids=str)
def test_weights_of_another_size_are_refused_before_anything_is_measured(tiny_folder, text_file, tmp_path, config):
    other = saved(tmp_path / "other", **config)
    plan = method_arms(["full"], SIZES) + ablation_arms(DISTILLED, SIZES, str(other))
    with pytest.raises(ValueError, match=f"{other} is not of model '{tiny_folder}'; .*: {{'{[*config][0]}': "):
        run_suite(options_for(tiny_folder, text_file, tmp_path / "out"), plan)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_family_are_refused(tiny_folder, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'model_type': \('gpt2', 'llama'\)"):
        load_weights(spec_of(tiny_folder), str(tmp_path), "auto", "cpu")


def trained_run(folder, base, weights) -> Path:
    """An output folder as scripts/train.py leaves it."""
    weights.save_pretrained(folder / FINAL)
    (folder / "run.json").write_text(json.dumps({"model": fingerprint(base, any_dtype=True)}))
    return folder


@pytest.mark.parametrize("others", [["full"], []], ids=["measured", "alone"])
def test_weights_trained_from_another_model_are_refused(tiny_folder, text_file, tmp_path, others):
    """Of the same family and size: only the fingerprint in run.json tells."""
    own, foreign = load_model(spec_of(tiny_folder)), load_model(spec_of(tiny_folder))
    with torch.no_grad():
        foreign.model.layers[0].mlp.up_proj.weight.neg_()
    plan = method_arms(others, SIZES)
    good = ablation_arms(DISTILLED, SIZES, str(trained_run(tmp_path / "good", own, foreign)))
    assert run_suite(options_for(tiny_folder, text_file, tmp_path / "out"), plan + good)["records"]
    bad = ablation_arms(DISTILLED, SIZES, str(trained_run(tmp_path / "bad", foreign, own)))
    with pytest.raises(ValueError, match=r"bad/final_model was trained from .* with weights [0-9a-f]+, not from"):
        run_suite(options_for(tiny_folder, text_file, tmp_path / "other"), plan + bad)


def adapter(base, folder, targets=("q_proj",)) -> Path:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=list(targets))).save_pretrained(folder)
    return folder


def test_an_adapter_of_another_base_is_refused(tiny_folder, tmp_path):
    """By its fingerprint where that is known, else by its name."""
    base = load_model(spec_of(tiny_folder))
    origin = fingerprint(base, any_dtype=True)
    path = adapter(base, tmp_path / "run" / FINAL)
    load_weights(spec_of(tiny_folder), str(path), "auto", "cpu")
    told = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": "somebody/else"}))
    with pytest.raises(ValueError, match="adapter at .* is of 'somebody/else', not of"):
        load_weights(spec_of(tiny_folder), str(path), "auto", "cpu")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"model": origin}))
    load_weights(spec_of(tiny_folder), str(path), "auto", "cpu")  # the same weights under another name
    (tmp_path / "run" / "run.json").write_text(json.dumps({"model": {**origin, "weights_sha256": "0" * 64}}))
    with pytest.raises(ValueError, match="with weights 0000000000000000, not from"):
        load_weights(spec_of(tiny_folder), str(path), "auto", "cpu")


@pytest.mark.parametrize("config", [{"num_hidden_layers": 3}, {"hidden_size": 32}], ids=str)
def test_an_adapter_that_does_not_fit_is_refused(tiny_folder, tmp_path, config):
    """More layers than the model has would be left out silently."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "attention_bias": False}
    sizes |= {"hidden_size": 64} if "hidden_size" in config else config
    other = tiny_model("llama", **sizes)
    other.config._name_or_path = other.name_or_path = str(tiny_folder)
    path = adapter(other, tmp_path)
    with pytest.raises(ValueError, match=f"adapter at {tmp_path} does not fit model '{tiny_folder}'"):
        load_weights(spec_of(tiny_folder), str(path), "auto", "cpu")


# -- what the numbers depend on ----------------------------------------------------------------------------------------
def test_a_retrained_checkpoint_is_another_setting(tiny_folder, text_file, tmp_path):
    model = load_model(spec_of(tiny_folder))
    model.save_pretrained(tmp_path / "trained")
    options = options_for(tiny_folder, text_file, tmp_path / "out")
    plan = ablation_arms(DISTILLED, SIZES, str(tmp_path / "trained"))
    first = run_suite(options, plan)["records"]
    assert run_suite(options, plan)["records"] == first
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="results of other settings: arms.trained differ"):
        run_suite(options, plan)
    before = Checkpoint.find(tmp_path / "trained").sha256
    (tmp_path / "trained").rename(tmp_path / "moved")
    assert Checkpoint.find(tmp_path / "moved").sha256 == before


def test_a_changed_model_or_file_of_articles_is_another_setting(tmp_path, tiny_folder, text_file):
    folder = tmp_path / "model"
    model = load_model(spec_of(tiny_folder))
    model.save_pretrained(folder)
    load_tokenizer(ModelSpec("tiny", str(tiny_folder), 2048, chat_template=False)).save_pretrained(folder)
    articles = tmp_path / "articles.jsonl"
    articles.write_text(json.dumps({"article": "a b c", "summary": "a"}))
    options = options_for(folder, text_file, tmp_path / "out", summaries=str(articles), new_tokens=2)
    plan = method_arms(["full"], SIZES)
    run_suite(options, plan)
    articles.write_text(json.dumps({"article": "a b d", "summary": "a"}))
    with pytest.raises(ValueError, match="results of other settings: summaries_sha256 differ"):
        run_suite(options, plan)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="results of other settings: model_sha256, summaries_sha256 differ"):
        run_suite(options, plan)


# -- windows -----------------------------------------------------------------------------------------------------------
def test_what_the_text_or_the_window_is_too_short_for_is_named_and_the_rest_measured(tiny_folder, text_file, tmp_path):
    plan = method_arms(["full"], SIZES) + ablation_arms({"method": "h2o", "grids": {"budget": [48]}}, SIZES)
    options = options_for(tiny_folder, text_file, tmp_path, lengths=(64, 1500, 4096), ablation_lengths=(1000,))
    results = run_suite(options, plan)
    assert {record["length"] for record in results["records"]} == {64}
    told = results["skipped"]
    assert list(told) == ["1,500 tokens", "4,096 tokens", "ablations at 1,000 tokens"]
    assert told["1,500 tokens"].startswith("the text has ") and "window of 2,048" in told["4,096 tokens"]
    assert "- 1,500 tokens: the text has" in report.write_report(tmp_path, results).read_text()
    with pytest.raises(ValueError, match="nothing can be measured: 4,096 tokens: beyond the model's window of 2,048"):
        run_suite(options_for(tiny_folder, text_file, tmp_path / "b", lengths=(4096,)), method_arms(["full"], SIZES))


def test_a_window_without_room_for_an_article_is_named(tiny_folder, text_file, tmp_path):
    """It used to cut the article at its end by what is missing."""
    tokenizer = load_tokenizer(ModelSpec("tiny", str(tiny_folder), 2048, chat_template=False))
    assert article_room(tokenizer, 40, 20) == 40 - 20 - 8  # a token per byte
    with pytest.raises(ValueError, match="window of 28 tokens has no room .* 8 of 'TL;DR:' .* 20; at least 29"):
        article_room(tokenizer, 28, 20)
    (tmp_path / "articles.jsonl").write_text(json.dumps({"article": "a b c", "summary": "a"}))
    options = options_for(tiny_folder, text_file, tmp_path, summaries=str(tmp_path / "articles.jsonl"))
    results = run_suite(options, method_arms(["full"], SIZES))
    assert "at least 137 are needed" in results["skipped"]["summaries"] and not results["refused"]
    assert {record["kind"] for record in results["records"]} == {"text"}
    subject = Subject(load_model(spec_of(tiny_folder)), tokenizer, spec_of(tiny_folder), frozenset())
    with pytest.raises(ValueError, match="has no room"):
        summarise(subject, method_arms(["full"], SIZES).arms[0], Article("a", "b"), 28, 20)


def test_a_model_with_learned_positions_is_measured_to_its_last_one(tiny_folder, text_file, tmp_path, monkeypatch):
    """The perplexity of a window as long as the model's counts, and later parts run, though no token can follow."""
    gpt2 = tmp_path / "gpt2"
    tokenizer = load_tokenizer(ModelSpec("tiny", str(tiny_folder), 2048, chat_template=False))
    tiny_model("gpt2", max_position_embeddings=256, vocab_size=len(tokenizer)).save_pretrained(gpt2)
    tokenizer.save_pretrained(gpt2)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    command = f"""--model_name_or_path {gpt2} --dataset_name {text_file} --output_dir {tmp_path / "out"}
        --sequence_lengths 128 256 --max_length 256 --sample_size 1 --max_cache_size 64 --num_clusters 16
        --pruning_interval 32 --lookback_window 16 --decode_steps 4 --device cpu --methods full h2o
        --run_evaluation --run_ablations"""
    assert importlib.import_module("run_experiments").main(command.split()) == 0
    content = (tmp_path / "out" / "evaluation_results.json").read_text()
    assert "NaN" not in content  # which is no JSON
    told = json.loads(content)
    rows = {(row["arm"], row["length"]): row for row in told["summary"]}
    assert math.isfinite(rows["h2o", 256]["perplexity"]) and rows["h2o", 256]["decode_tokens_per_second"] is None
    assert rows["h2o", 128]["decode_tokens_per_second"] > 0
    assert "prune only" in {arm for arm, _ in rows} and not [w for w in told["refused"].values() if "positions" in w]


def test_ablations_alone_are_drawn(tiny_folder, text_file, tmp_path):
    plan = ablation_arms({"method": "h2o", "grids": {"budget": [48, 56]}}, SIZES)
    page = report.write_report(tmp_path, run_suite(options_for(tiny_folder, text_file, tmp_path), plan))
    assert [path.name for path in (tmp_path / "visualizations").iterdir()] == ["bytes_perplexity.png"]
    assert "visualizations/bytes_perplexity.png" in page.read_text()
