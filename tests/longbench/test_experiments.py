"""The comparison scripts on a tiny model: everything asked for is measured, named or refused, and never twice."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from longbench_files import other_process, write_inputs, write_rows
from tiny_models import tiny_model

import asymkv
from asymkv import CompressionConfig
from asymkv.experiments import measure, report, suite
from asymkv.experiments.arms import Sizes, SuiteArm, ablation_arms, load_suite, method_arms
from asymkv.experiments.checkpoint import FINAL, load_weights
from asymkv.experiments.corpus import read_articles, read_text, windows
from asymkv.experiments.measure import check_rows, measure_text, stream
from asymkv.experiments.suite import Options, run_suite
from asymkv.experiments.tasks import rouge
from asymkv.longbench.arms import StoredTooMuchError
from asymkv.longbench.jsonl import NotFiniteError
from asymkv.longbench.models import ModelSpec, load_model, parse_dtype

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIZES = Sizes(budget=96, stride=64, own={"zack": {"ratio": 0.5}})
SUITE = {
    "method": "h2o", "defaults": {"window_size": 16}, "grids": {"budget": [48, 96], "window_size": [16, 900]},
    "steps": [{"name": "plain"}, {"name": "normalised", "normalize": True}, {"name": "trained", "distilled": True}],
}  # fmt: skip


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"line {i * i % 977} says {i % 31};" for i in range(400)))
    return path


def options_for(tiny_folder, text_file, out, **extra) -> Options:
    given = {"lengths": (128, 256, 4096), "ablation_lengths": (256,), "samples": 2, "decode_steps": 2, **extra}
    return Options(model=str(tiny_folder), out=out, text=str(text_file), **given)


# -- arms --------------------------------------------------------------------------------------------------------------
def test_methods_run_at_one_size_and_in_equal_turns() -> None:
    plan = method_arms(["full", "h2o", "snapkv", "streaming_llm", "zack"], SIZES)
    arms = {arm.name: arm for arm in plan.arms}
    assert not plan.refused and {arm.stride for arm in plan.arms} == {64}
    assert {arms[n].config.budget for n in ("h2o", "snapkv", "streaming_llm")} == {96}
    assert arms["h2o"].config.chunk == 64 and arms["snapkv"].config.chunk is None
    assert arms["zack"].config.row_dimensions is not None and arms["zack"].config.row_dimensions.ratio == 0.5


def test_what_cannot_be_is_refused_with_its_reason() -> None:
    plan = method_arms(["h2o", "nothing"], SIZES)
    assert [arm.name for arm in plan.arms] == ["h2o"] and "nothing" in plan.refused["nothing"]
    with pytest.raises(ValueError, match="must be named once"):
        method_arms(["h2o", "h2o"], SIZES)


def test_ablations_vary_one_number_at_a_time() -> None:
    plan = ablation_arms(SUITE, SIZES)
    found = {arm.name: (arm.group, arm.config.budget, arm.config.window_size) for arm in plan.arms}
    assert found["budget=48"] == ("budget", 48, 16) and found["window_size=16"] == ("window_size", 96, 16)
    assert found["plain"][0] == found["normalised"][0] == "steps"
    assert "smaller than sink_size + window_size" in plan.refused["window_size=900"]
    assert "no checkpoint" in plan.refused["trained"]
    trained = ablation_arms(SUITE, SIZES, "somewhere")
    assert [arm.checkpoint for arm in trained.arms if arm.name == "trained"] == ["somewhere"]
    same = {arm.name: arm.identity for arm in plan.arms}
    assert same["budget=96"] == same["window_size=16"] == same["plain"] != same["normalised"]


def test_the_shipped_suite_names_the_settings_of_ours() -> None:
    shipped = load_suite("aagc")
    plan = ablation_arms({**shipped, "method": "h2o", "grids": {"budget": shipped["grids"]["budget"]}, "steps": []},
                         Sizes(1024, 512))  # fmt: skip
    assert [arm.config.budget for arm in plan.arms] == [256, 512, 1024, 2048, 4096]
    assert set(shipped["grids"]) == {"budget", "num_clusters", "pruning_interval", "lookback_window"}
    assert [step["name"] for step in shipped["steps"]] == [
        "full cache", "prune only", "+ clusters", "+ cardinality", "+ distillation", "full cache, distilled"]
    steps = {arm.name: arm for arm in ablation_arms({**shipped, "grids": {}}, Sizes(96, 64), "somewhere").arms}
    assert steps["full cache, distilled"].against == "full cache" and steps["prune only"].against is None
    aliased = ablation_arms({"method": "h2o", "steps": [{"name": "a", "method": "razor_attention"}]}, SIZES)
    assert aliased.arms[0].config.method == "razor" and not aliased.refused
    assert steps["full cache"].config.method == "full" and steps["full cache, distilled"].checkpoint == "somewhere"


@pytest.mark.parametrize("content", ["[1]", "{grids: {}}", "{method: h2o, gird: {}}", "{method: h2o, steps: [{}]}",
                                     "{method: h2o, steps: [{name: a, against: b}]}",
                                     "{method: h2o, steps: [{name: a, against: a}]}"])  # fmt: skip
def test_bad_suites_are_named(tmp_path, content) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="suite.yaml"):
        load_suite(path)


# -- texts -------------------------------------------------------------------------------------------------------------
def test_texts_and_articles(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert read_text(str(tmp_path)) == "one\n\ntwo" and read_text(str(tmp_path / "a.txt")) == "one"
    assert len(read_text("embedded")) > 100_000
    rows = [{"article": "long", "highlights": "short"}, {"context": "c", "answers": ["a", "b"]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_articles(str(tmp_path / "rows.jsonl"), 5)
    assert [(a.text, a.summary) for a in found] == [("long", "short"), ("c", "a")]
    (tmp_path / "bad.jsonl").write_text('{"article": "x"}')
    with pytest.raises(ValueError, match="needs one of .*highlights"):
        read_articles(str(tmp_path / "bad.jsonl"), 5)


def test_windows_are_spread_evenly() -> None:
    ids = torch.arange(100)
    assert [int(w[0]) for w in windows(ids, 40, 3)] == [0, 30, 60]
    assert len(windows(ids, 100, 3)) == 1
    with pytest.raises(ValueError, match="has 100 tokens; a window of 101"):
        windows(ids, 101, 1)


def test_rouge_of_equal_and_of_other_texts() -> None:
    assert rouge("a red fox ran", "a red fox ran") == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert rouge("a red fox ran", "one two") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


# -- measures ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(ModelSpec("tiny", str(tiny_folder), 2048))


def test_turns_on_the_full_cache_cost_what_one_forward_does(model) -> None:
    ids = torch.randint(5, 200, (2, 150))
    want = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(),
                                             reduction="none").view(2, -1)  # fmt: skip
    for stride in (150, 64, 1):
        with asymkv.replace("llama", model=model, method="full"):
            losses, cache, _ = stream(model, ids, stride)
        assert torch.allclose(losses, want, atol=1e-4) and cache.get_seq_length() == 150


def test_a_measure_says_what_is_stored(model) -> None:
    ids = torch.randint(5, 200, (2, 200))
    arm = method_arms(["h2o"], SIZES).arms[0]
    records = measure_text(model, arm, ids, 2)
    assert len(records) == 2 and records[0]["nll_sum"] != records[1]["nll_sum"]
    found = records[0]
    assert found["rows_per_head"] == 96 and found["scored_tokens"] == 199 and found["compactions"] == 3
    assert found["peak_rows"] <= 96 + 64
    assert found["full_bytes"] == 200 * 2 * 2 * 2 * 8 * 4
    assert 0.5 * found["full_bytes"] < found["stored_bytes"] < found["full_bytes"]
    assert found["tokens_per_second"] > 0 and found["decode_tokens_per_second"] > 0


def test_decoding_is_timed_as_far_as_there_are_positions(tmp_path) -> None:
    short = tiny_model("gpt2", max_position_embeddings=128)
    arm = method_arms(["h2o"], Sizes(64, 32)).arms[0]
    rates = {n: measure_text(short, arm, torch.randint(5, 120, (1, n)), 4)[0]["decode_tokens_per_second"]
             for n in (100, 125, 128)}  # fmt: skip
    assert rates[100] > 0 and rates[125] > 0 and rates[128] is None
    assert [measure.steps_left(short, n, 4) for n in (100, 125, 126, 128)] == [4, 1, 0, 0]


def test_an_arm_that_does_not_compress_is_an_error(model) -> None:
    h2o = method_arms(["h2o"], SIZES).arms[0]
    idle = CompressionConfig("h2o", budget=1000)  # never full on this text, as if the model had not been patched
    with asymkv.replace("llama", idle, model=model):
        _, cache, _ = stream(model, torch.randint(5, 200, (1, 200)), 64)
    with pytest.raises(StoredTooMuchError, match="h2o holds 200 rows per KV head after 200 tokens"):
        check_rows(h2o, cache.num_rows(0).double().mean().item(), 200)


def test_a_loss_that_is_no_number_is_an_error(tiny_folder) -> None:
    broken = load_model(ModelSpec("tiny", str(tiny_folder), 2048))
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    arm = SuiteArm("full", "methods", CompressionConfig("full"), 64)
    with pytest.raises(NotFiniteError, match="loss of token 1 is not finite"):
        measure_text(broken, arm, torch.randint(5, 200, (1, 100)), 0)


# -- a run -------------------------------------------------------------------------------------------------------------
def test_a_run_goes_on_where_it_stopped_and_reports_all(tiny_folder, text_file, tmp_path, monkeypatch) -> None:
    plan = method_arms(["full", "h2o", "razor"], SIZES) + ablation_arms(SUITE, SIZES)
    options = options_for(tiny_folder, text_file, tmp_path)
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path / "empty"))
    calls, real = [], suite.measure_text

    def counted(model, arm, batch, steps):
        calls.append((arm.name, batch.shape[1]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(model, arm, batch, steps)

    monkeypatch.setattr(suite, "measure_text", counted)
    with pytest.raises(KeyboardInterrupt):
        run_suite(options, plan)
    results = run_suite(options, plan)
    # One was interrupted, and razor has no head scores in either run; budget=96, window_size=16 and plain are one arm.
    measured = [call for call in calls if call[0] != "razor"]
    assert len(measured) - (calls[3][0] != "razor") == 2 * 2 * 2 + 2 * 3 and len(calls) - len(measured) == 2
    keys = [(r["kind"], r["arm"], r["length"], r["item"]) for r in results["records"]]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2 + 2 * 5
    assert results["skipped"] == {"4,096 tokens": "beyond the model's window of 2,048"}
    assert "find_retrieval_heads" in results["refused"]["razor"]
    before = len(calls)
    records = tmp_path / "records" / "records-0of1.jsonl"
    with other_process(records) as process:
        assert process.stdout.readline() == "held\n"  # the run that is over holds it no more
        with pytest.raises(ValueError, match="records-0of1.jsonl is being written by another process"):
            run_suite(options, plan)
        process.kill()
    assert run_suite(options, plan)["records"] == results["records"] and calls[before:] == [("razor", 128)]
    page = report.write_report(tmp_path, results).read_text()
    for part in ("| h2o |", "Ablation: budget", "| budget=48 |", "What each part brings", "| normalised |",
                 "4,096 tokens: beyond", "razor: ", "window_size=900: ", "trained: no checkpoint"):  # fmt: skip
        assert part in page, part
    assert {p.name for p in (tmp_path / "visualizations").iterdir()} == {
        "perplexity_length.png", "bytes_perplexity.png", "tokens_per_second.png", "memory.png"}  # fmt: skip
    saved = json.loads((tmp_path / "evaluation_results.json").read_text())
    rows = {(r["arm"], r["length"]): r for r in saved["summary"]}
    assert rows["full", 128]["perplexity"] == pytest.approx(math.exp(rows["full", 128]["loss"]))
    assert rows["h2o", 256]["share"] < rows["full", 256]["share"]
    with pytest.raises(ValueError, match="results of other settings: samples"):
        run_suite(options_for(tiny_folder, text_file, tmp_path, samples=3), plan)


def test_answers_to_other_rows_prompts_or_batches_are_not_taken_over(tiny_folder, text_file, tmp_path) -> None:
    inputs, out = write_inputs(tmp_path, rows=2), tmp_path / "out"
    given = {"lengths": (), "longbench": ("qasper",), "data_dir": str(inputs), "longbench_config": str(inputs),
             "changed_prompts": True}  # fmt: skip
    plan = method_arms(["full"], SIZES)
    assert len(run_suite(options_for(tiny_folder, text_file, out, **given), plan)["records"]) == 2
    assert len(run_suite(options_for(tiny_folder, text_file, out, **given), plan)["records"]) == 2
    with pytest.raises(ValueError, match="other settings: batch"):
        run_suite(options_for(tiny_folder, text_file, out, batch=2, **given), plan)
    rows = (inputs / "qasper.jsonl").read_text(encoding="utf-8")
    (inputs / "qasper.jsonl").write_text(rows.replace("a1", "another"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"other settings: contents\.qasper"):
        run_suite(options_for(tiny_folder, text_file, out, **given), plan)
    (inputs / "qasper.jsonl").write_text(rows, encoding="utf-8")
    (inputs / "dataset2maxlen.json").write_text('{"qasper": 23}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"other settings: prompt\.qasper"):
        run_suite(options_for(tiny_folder, text_file, out, **given), plan)


def test_summaries_of_articles_that_were_cut_otherwise_are_not_averaged(tiny_folder, text_file, tmp_path) -> None:
    articles = tmp_path / "articles.jsonl"
    write_rows(articles, [{"article": "a b c " * 200, "summary": "a b"}] * 2)
    given = {"ablation_lengths": (), "summaries": str(articles), "new_tokens": 4, "samples": 2}
    plan, out = method_arms(["full"], SIZES), tmp_path / "out"
    for lengths in ((160,), (160, 320), (160,)):
        options = options_for(tiny_folder, text_file, out, **{**given, "lengths": lengths})
        records = [r for r in run_suite(options, plan)["records"] if r["kind"] == "summary"]
        assert [(r["length"], r["item"]) for r in records] == [(max(lengths), "0"), (max(lengths), "1")]


def test_a_distilled_step_runs_on_its_checkpoint(tiny_folder, text_file, tmp_path) -> None:
    trained = load_model(ModelSpec("tiny", str(tiny_folder), 2048))
    with torch.no_grad():
        trained.lm_head.weight.mul_(0.5)
    trained.save_pretrained(tmp_path / "trained" / FINAL)
    only = {**SUITE, "grids": {}}
    plan = ablation_arms(only, SIZES, str(tmp_path / "trained"))
    results = run_suite(options_for(tiny_folder, text_file, tmp_path / "out"), plan)
    assert not results["refused"]
    losses = {r["arm"]: r["nll_sum"] for r in results["records"] if r["item"] == "0"}
    assert losses["trained"] != losses["plain"]
    found = {(row["step"], row["against"]): row for row in report.gains(results)}
    row = found["trained", "normalised"]
    assert row["windows"] == 2 and row["low"] <= row["change"] <= row["high"]
    with pytest.raises(ValueError, match="holds no weights: config.json or adapter_config.json"):
        load_weights(ModelSpec("tiny", str(tiny_folder), 2048), str(tmp_path / "nowhere"), "auto", "cpu")


def test_ablations_read_windows_of_several_lengths(tiny_folder, text_file, tmp_path) -> None:
    given = {"method": "h2o", "grids": {"budget": [48]}, "steps": [
        {"name": "whole", "method": "full"}, {"name": "plain"},
        {"name": "mean", "normalize": True, "against": "whole"}]}  # fmt: skip
    options = options_for(tiny_folder, text_file, tmp_path, lengths=(), ablation_lengths=(256, 128))
    results = run_suite(options, ablation_arms(given, SIZES))
    lengths = {(r["arm"], r["length"]) for r in results["records"]}
    assert {(arm, n) for arm in ("budget=48", "whole", "plain", "mean") for n in (128, 256)} <= lengths
    losses = {(r["arm"], r["length"], r["item"]): r["nll_sum"] / r["scored_tokens"] for r in results["records"]}
    found = {(row["step"], row["against"], row["length"]): row for row in report.gains(results)}
    for step in ("plain", "mean"):
        for n in (128, 256):
            expected = np.mean([losses[step, n, i] - losses["whole", n, i] for i in "01"])
            assert found[step, "whole", n]["change"] == pytest.approx(expected)
    page = report.write_report(tmp_path, results).read_text()
    assert "| step | 128 tokens | 256 tokens |" in page and "steps_length.png" in page


def test_an_adapter_is_merged(tiny_folder, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    spec = ModelSpec("tiny", str(tiny_folder), 2048)
    adapted = peft.get_peft_model(load_model(spec), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    adapted.save_pretrained(tmp_path)
    ids = torch.randint(5, 200, (1, 20))
    merged = load_weights(spec, str(tmp_path), "auto", "cpu")
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    assert not torch.allclose(merged(ids).logits, load_model(spec)(ids).logits, atol=1e-5)


def test_intervals_hold_the_mean() -> None:
    low, high = report.interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert low < 2.5 < high and report.interval(np.array([1.0])) != (1.0, 1.0)
    assert report.interval(np.array([2.0, 2.0])) == (2.0, 2.0)


# -- scripts -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


FLAGS = ["--device", "cpu", "--sample_size", "1", "--decode_steps", "0", "--max_cache_size", "96",
         "--pruning_interval", "64", "--lookback_window", "32", "--num_clusters", "16"]  # fmt: skip


def test_one_command_calibrates_and_one_compares(script, tiny_folder, text_file, tmp_path, capsys, monkeypatch) -> None:
    """Texts, ablations, summaries and LongBench rows; a method without its scores is named, and the code says so."""
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path / "cache"))
    calibrate = script("calibrate_zack")
    assert calibrate.main(["--model", str(tiny_folder), "--text-file", str(text_file), "--tokens", "200", "--samples",
                           "2", "--device", "cpu"]) == 0  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    (tmp_path / "zack.yaml").write_text("method: zack\ndimensions: {kind: zack, multiple: 2, least: 2}")  # heads of 8
    (tmp_path / "articles.jsonl").write_text(json.dumps({"article": "a b c " * 80, "summary": "a b"}))
    command = ["--model_name_or_path", str(tiny_folder), "--dataset_name", str(text_file), "--output_dir",
               str(tmp_path / "out"), "--sequence_lengths", "160", "--max_length", "128", *FLAGS, "--methods", "full",
               str(tmp_path / "zack.yaml"), "uncomp", "--suite", str(tmp_path / "suite.yaml"),
               "--summarization_dataset", str(tmp_path / "articles.jsonl"), "--longbench", "needle",
               "--run_evaluation", "--run_ablations", "--run_summarization", "--calibration_text", "none"]  # fmt: skip
    assert script("run_experiments").main(command) == 1
    out = capsys.readouterr()
    assert "not measured: uncomp" in out.err and "results.md" in out.out and "ranks of the layers" in out.out
    saved = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())
    kinds = {(r["kind"], r["arm"]) for r in saved["records"]}
    assert {("text", "zack"), ("summary", "zack"), ("longbench", "zack"), ("text", "budget=48")} <= kinds
    rows = {row["arm"]: row for row in saved["summary"] if row["group"] == "methods"}
    assert rows["zack"]["rows_per_head"] == rows["full"]["rows_per_head"]
    assert rows["zack"]["stored_bytes"] < rows["full"]["stored_bytes"]


def test_one_command_measures_what_its_methods_lack(script, tiny_folder, text_file, tmp_path, monkeypatch) -> None:
    """Head scores and bases are made once per model, on another text than the one that is compared on."""
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other.txt").write_text("other words, again and again. " * 60)
    (tmp_path / "zack.yaml").write_text("method: zack\ndimensions: {kind: zack, multiple: 2, least: 2}")
    command = ["--model_name_or_path", str(tiny_folder), "--dataset_name", str(text_file), "--sequence_lengths", "160",
               *FLAGS, "--methods", "full", str(tmp_path / "zack.yaml"), "razor", "uncomp", "--calibration_text",
               str(tmp_path / "other.txt")]  # fmt: skip
    run = script("run_experiments")
    assert run.main([*command, "--output_dir", str(tmp_path / "out"), "--run_evaluation"]) == 0
    files = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*.*")}
    assert {"induction.json", "echo.json", "entropy.json", "basis.json"} <= {p.name for p in files}
    saved = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())
    assert {r["arm"] for r in saved["records"]} == {"full", "zack", "razor", "uncomp"}
    assert run.main([*command, "--output_dir", str(tmp_path / "again"), "--run_evaluation"]) == 0
    assert files == {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*.*")}


@pytest.mark.parametrize("name", ["calibrate_zack", "find_retrieval_heads", "run_experiments"])
def test_a_dtype_that_is_none_lists_those_that_are(script, name, capsys) -> None:
    given = ["--text-file", "x"] * (name != "run_experiments") + ["--model", "x"] * (name != "run_experiments")
    with pytest.raises(SystemExit):
        script(name).parse_args([*given, "--dtype", "foo"])
    told = capsys.readouterr().err
    assert "argument --dtype: invalid choice: 'foo'" in told and "bfloat16" in told
    with pytest.raises(ValueError, match="dtype='foo'; allowed: .*'bfloat16'"):
        parse_dtype("foo")


def test_evaluation_alone_takes_the_public_flags(script, tiny_folder, text_file, tmp_path) -> None:
    command = ["--model_name_or_path", str(tiny_folder), "--dataset_name", str(text_file), "--output_dir",
               str(tmp_path), "--max_length", "128", "--batch_size", "2", "--seed", "7", "--methods", "full",
               "dynamic_kv", "--sequence_lengths", "160", "--dynamic_kv_budget", "48", *FLAGS,
               "--kmeans_learning_rate", "0.02", "--sample_size", "2"]  # fmt: skip
    assert script("evaluate").main(command) == 0
    rows = {r["arm"]: r for r in json.loads((tmp_path / "evaluation_results.json").read_text())["summary"]}
    assert rows["dynamic_kv"]["rows_per_head"] == 48 and rows["full"]["rows_per_head"] == 160
    assert rows["full"]["windows"] == 2
