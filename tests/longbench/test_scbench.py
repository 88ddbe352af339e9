"""Several questions on one context: SCBench's rows and scores, and what the cache holds when each is asked."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_press_arms import KeepLast

import asymkv
from asymkv.longbench import arms, data, models, prompts, retention, runner, suites
from asymkv.longbench import measure as single
from asymkv.longbench.checks import check_asked
from asymkv.longbench.measure import Protocol, measure
from asymkv.longbench.press_arms import PressArm, PressSpec
from asymkv.longbench.suites import scbench

ROW = {
    "id": 0, "context": " ".join(f"k{i}: v{i * 7};" for i in range(60)),
    "multi_turns": [{"input": f"Key k{i}?", "answer": f"v{i * 7}"} for i in (3, 40, 11)],
}  # fmt: skip


def write(folder: Path, dataset: str, *rows: dict) -> Path:
    (folder / f"{dataset}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def subject(tiny_folder: Path) -> single.Subject:
    spec = models.resolve_spec(str(tiny_folder), max_length=1500)
    return runner.load_subject(spec, torch.device("cpu"), "float32")


def run(subject: single.Subject, row: data.Row, method: str, protocol: str = "context", **settings) -> single.Record:
    (arm,) = arms.make_arms([method], ratio=0.3, settings={"": {"sink_size": 2, "window_size": 8, **settings}})
    with asymkv.replace("llama", arm.config, model=subject.model):
        task = data.load_tasks(["scbench_kv"])["scbench_kv"]
        return measure(subject, arm, task, row, Protocol(protocol, max_new_tokens=5))


def test_rows_keep_their_turns_and_ids_depend_on_the_mode(tmp_path: Path) -> None:
    folder = write(tmp_path, "scbench_kv", ROW)
    (row,) = data.load_rows("scbench_kv", data_dir=folder)
    assert [turn["input"] for turn in row["turns"]] == ["Key k3?", "Key k40?", "Key k11?"]
    assert (row["mode"], row["earlier"], row["turns"][1]["answers"]) == ("multi_turn", "gold", ["v280"])
    other = [data.load_rows("scbench_kv", data_dir=folder, options=options)[0]["_id"]
             for options in ({"mode": "shared"}, {"earlier": "model"}, {"turns": 2})]  # fmt: skip
    assert len({row["_id"], *other}) == 4
    (tmp_path / "scbench_kv.jsonl").rename(tmp_path / "multi_turn_kv.jsonl")
    assert data.load_rows("scbench_kv", data_dir=folder) == [row]


@pytest.mark.parametrize(
    ("dataset", "turn", "message"),
    [
        ("scbench_kv", {"input": "?"}, r"kv.jsonl:1, turn 1 lacks the field 'answer'; it has input"),
        ("scbench_kv", {"input": "?", "answer": []}, "turn 1: field 'answer' is empty"),
        ("scbench_mf", {"input": "?", "answer": "many"}, "'answer' must be a number, found 'many'"),
        ("scbench_choice_eng", {"input": "?", "options": ["a"], "answer": "b"}, "'answer' must be one of the options"),
        ("scbench_summary_with_needles", {"input": "?", "answer": "b", "task": "x"}, "'task' must be one of scbench_s"),
    ],
)  # fmt: skip
def test_bad_turns_are_placed(dataset: str, turn: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        data.load_rows(dataset, data_dir=write(tmp_path, dataset, {"context": "c", "multi_turns": [turn]}))
    with pytest.raises(ValueError, match="lacks the field 'multi_turns'"):
        data.load_rows(dataset, data_dir=write(tmp_path, dataset, {"context": "c"}))
    with pytest.raises(ValueError, match="mode must be one of multi_turn, shared, found 'scdq'"):
        data.load_rows(dataset, data_dir=tmp_path, options={"mode": "scdq"})


@pytest.mark.parametrize(
    ("dataset", "said", "answers", "score"),
    [
        ("scbench_kv", "it is v21, I think", ["v21"], 1.0), ("scbench_kv", "V21", ["v21"], 0.0),
        ("scbench_vt", "abc and def", ["ABC", "DEF", "GHI"], 0.67), ("scbench_qa_eng", "so LONDON.", ["London"], 1.0),
        ("scbench_qa_chn", "\u4f60\u597d\uff0c", ["\u4f60"], 2 / 3),
        ("scbench_choice_eng", "B. no", ["yes", "B"], 1.0), ("scbench_choice_eng", "yes", ["yes", "B"], 1.0),
        ("scbench_choice_eng", "", ["yes", "B"], 0.0), ("scbench_choice_eng", "my answer is: B", ["yes", "B"], 1.0),
        ("scbench_choice_eng", "well, \"C\" or B", ["yes", "B"], 0.0),
        ("scbench_choice_eng", "perhaps", ["y", "B"], 0.0), ("scbench_mf", "It is 12.7", ["12"], 1.0),
        ("scbench_mf", "12.5", ["12.5"], 1.0), ("scbench_mf", "no", ["1"], 0.0),
        ("scbench_summary", "the cat sat\nall day", ["the cat sat\nall day"], 1.0),
        ("scbench_many_shot", "(b)", ["(B)"], 1.0),
    ],
)  # fmt: skip
def test_scores_are_those_of_scbench(dataset: str, said: str, answers: list[str], score: float) -> None:
    found = suites.find(dataset)
    assert found is not None and found.score({"pred": said, "answers": answers}) == pytest.approx(score)


def test_every_question_counts_alike() -> None:
    def turn(said: str, task: str) -> dict:
        return {"pred": said, "answers": ["12"], "task": task}

    records = [
        {"turns": [turn("12", scbench.PASSKEY), turn("12", scbench.SUMMARY)]},
        {"turns": [turn("no", scbench.PASSKEY)]},
    ]
    found = suites.find("scbench_summary_with_needles")
    assert found is not None and found.details is not None and found.total(records) == 66.67
    assert found.details(records) == {"turn 1": 50.0, "turn 2": 100.0, scbench.PASSKEY: 50.0, scbench.SUMMARY: 100.0}


def test_a_choice_is_asked_with_its_options(tmp_path: Path) -> None:
    turns = [{"input": "Who?", "options": ["Ann", "Bo", "Cy", "Di"], "answer": "Cy"}]
    folder = write(tmp_path, "scbench_choice_eng", {"context": "c", "multi_turns": turns})
    (row,) = data.load_rows("scbench_choice_eng", data_dir=folder)
    assert row["turns"][0]["answers"] == ["Cy", "C"] and "\nC. Cy\nD. Di\n" in row["turns"][0]["input"]


def load(tmp_path: Path, **options) -> data.Row:
    return data.load_rows("scbench_kv", data_dir=write(tmp_path, "scbench_kv", ROW), options=options)[0]


@pytest.mark.parametrize("method", ["full", "streaming_llm", "none"])
@pytest.mark.parametrize(
    ("mode", "protocol"), [("shared", "context"), ("multi_turn", "context"), ("multi_turn", "prompt")]
)
def test_a_record_has_an_answer_and_a_loss_per_question(method, mode, protocol, subject, tmp_path) -> None:
    record = run(subject, load(tmp_path, mode=mode), method, protocol)
    assert len(record["pred"]) == len(record["turns"]) == 3 and record["answers"] == [["v21"], ["v280"], ["v77"]]
    assert [turn["pred"] for turn in record["turns"]] == record["pred"]
    assert record["nll"] == pytest.approx(sum(turn["nll"] for turn in record["turns"]) / 3)
    assert record["gold_tokens"] == sum(turn["gold_tokens"] for turn in record["turns"]) > 3
    if method == "streaming_llm":
        assert record["kept_ratio"] == pytest.approx(0.3, abs=0.01)
    assert record["peak_rss_bytes"] > 1e7 and record["peak_rss_increase_bytes"] >= 0
    json.dumps(record)


def test_shared_questions_do_not_see_each_other(subject, tmp_path) -> None:
    row = load(tmp_path, mode="shared")
    together = run(subject, row, "streaming_llm")
    for number, turn in enumerate(row["turns"]):
        alone = run(subject, {**row, "turns": [turn]}, "streaming_llm")
        assert alone["turns"][0]["nll"] == pytest.approx(together["turns"][number]["nll"], abs=1e-6)
        assert alone["pred"][0] == together["pred"][number]
        # The question lies on the compressed context as it is.
        assert together["turns"][number]["stored_bytes"] > together["stored_bytes"]


@pytest.mark.parametrize("earlier", ["gold", "model"])
def test_a_conversation_on_a_full_cache_is_one_text(earlier: str, subject, tmp_path) -> None:
    row = load(tmp_path, earlier=earlier)
    record = run(subject, row, "full", "prompt")
    tokenizer, task = subject.tokenizer, data.load_tasks(["scbench_kv"])["scbench_kv"]
    (first,) = prompts.shared_prompts(row, [row["turns"][0]["input"]], task.template, tokenizer, subject.spec)
    text, spoken = tokenizer.decode(first.ids), []
    for number, turn in enumerate(row["turns"]):
        if number:
            text += spoken[-1] + "</s><|user|>" + turn["input"] + "</s><|assistant|>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with asymkv.replace("llama", asymkv.CompressionConfig(method="full"), model=subject.model):
            prefix = retention.compress(subject.model, ids[0].tolist())
            # The template ends in a visible character, so a space joins the answer.
            gold = tokenizer(f" {turn['answers'][0]}", add_special_tokens=False).input_ids
            expected = retention.answer_nll(subject.model, prefix, [], gold)
            said, _ = single.greedy(subject.model, prefix.cache, prefix.last_logits, 5, subject.stop_ids)
        assert record["turns"][number]["nll"] == pytest.approx(expected, rel=1e-4)
        assert record["pred"][number] == tokenizer.decode(said, skip_special_tokens=True)
        spoken.append(f" {turn['answers'][0]}" if earlier == "gold" else tokenizer.decode(said))


@pytest.mark.parametrize(("mode", "earlier"), [("shared", "gold"), ("multi_turn", "gold"), ("multi_turn", "model")])
def test_the_stock_cache_of_a_press_says_the_same_as_ours(mode: str, earlier: str, subject, tmp_path) -> None:
    row = load(tmp_path, mode=mode, earlier=earlier)
    task, stock = data.load_tasks(["scbench_kv"])["scbench_kv"], PressArm("full")
    with stock.applied(subject.model):
        found = measure(subject, stock, task, row, Protocol("context", max_new_tokens=5))
    ours = run(subject, row, "full")
    assert found["pred"] == ours["pred"] and found["nll"] == pytest.approx(ours["nll"], rel=1e-4)


@pytest.fixture
def press(monkeypatch) -> PressArm:
    """An arm that keeps the last 30 % of a prompt, applied as the worker applies presses of kvpress."""
    fake = SimpleNamespace(pressing=lambda model, press, ids: press(model), moves_keys=lambda press: False)
    monkeypatch.setitem(sys.modules, "asymkv.longbench.presses", fake)
    monkeypatch.setattr("asymkv.longbench.presses", fake, raising=False)
    monkeypatch.setattr(PressArm, "_build", lambda self, tokens, _: KeepLast(*[int(0.3 * tokens)] * 2))
    return PressArm("kvpress_Last", PressSpec("Last"), 0.3)


def test_a_press_answers_questions_apart(subject, press, tmp_path) -> None:
    row, task = load(tmp_path, mode="shared"), data.load_tasks(["scbench_kv"])["scbench_kv"]
    with press.applied(subject.model):
        together = measure(subject, press, task, row, Protocol("context", max_new_tokens=5))
        for number, turn in enumerate(row["turns"]):
            alone = measure(subject, press, task, {**row, "turns": [turn]}, Protocol("context", max_new_tokens=5))
            assert alone["pred"] == together["pred"][number : number + 1]
            assert alone["nll"] == pytest.approx(together["turns"][number]["nll"], abs=1e-6)
    assert together["kept_ratio"] == pytest.approx(0.3, abs=0.01) and len(together["pred"]) == 3


def test_a_press_is_refused_a_conversation(subject, press, tmp_path) -> None:
    row, tasks = load(tmp_path), data.load_tasks(["scbench_kv"])
    message = "kvpress_Last compresses one prompt and leaves what follows .* of scbench_kv with option mode 'shared'"
    with press.applied(subject.model), pytest.raises(arms.ArmError, match=message):
        measure(subject, press, tasks["scbench_kv"], row, Protocol("context"))
    with pytest.raises(arms.ArmError, match=message):
        check_asked([*arms.make_arms(["full"]), press], tasks, {"scbench_kv": [row]}, subject, Protocol("context"))
    check_asked([press], tasks, {"scbench_kv": [load(tmp_path, mode="shared")]}, subject, Protocol("context"))


@pytest.mark.parametrize(
    ("options", "protocol", "message"),
    [
        ({"mode": "shared"}, Protocol("prompt"), "scbench_kv: mode 'shared' .* found prompt"),
        ({"earlier": "model"}, Protocol("context", generate=False), "so they must be generated"),
        ({"earlier": "model"}, Protocol("context", max_new_tokens=800), "the questions of row '.*' leave no room"),
    ],
)
def test_what_would_stop_a_run_later_is_found_first(options, protocol, message, subject, tmp_path) -> None:
    row, tasks = load(tmp_path, **options), data.load_tasks(["scbench_kv"])
    tasks["scbench_kv"] = dataclasses.replace(tasks["scbench_kv"], max_new_tokens=800)
    with pytest.raises(ValueError, match=message):
        check_asked(arms.make_arms(["full"]), tasks, {"scbench_kv": [row]}, subject, protocol)


def test_later_turns_are_compressed_too(subject, tmp_path) -> None:
    record = run(subject, load(tmp_path), "streaming_llm", "prompt", decode_interval=0)
    fed = record["prompt_tokens"] + sum(turn["question_tokens"] for turn in record["turns"])
    full = run(subject, load(tmp_path), "full", "prompt")
    assert full["turns"][2]["stored_bytes"] > 2.5 * record["turns"][2]["stored_bytes"] and fed > record["prompt_tokens"]


def test_a_long_context_is_cut_once_for_all_questions(subject) -> None:
    row = {"context": "x" * 3000, "intro": "Read.", "input": ""}
    asked = ["?", "a rather long question that takes some room"]
    short, longer = prompts.shared_prompts(row, asked, scbench.TEMPLATE, subject.tokenizer, subject.spec)
    assert short.context_ids == longer.context_ids and short.removed_tokens == longer.removed_tokens > 1500
    text = subject.tokenizer.decode(longer.ids, skip_special_tokens=True)
    assert len(text) == subject.spec.max_length and asked[1] in text
    with pytest.raises(ValueError, match="leave no room for its context: prompt limit 1500 tokens, 1400 of them"):
        prompts.shared_prompts(row, asked, scbench.TEMPLATE, subject.tokenizer, subject.spec, reserve=1400)


def test_shared_is_refused_where_a_question_would_be_in_view(subject, tmp_path) -> None:
    with pytest.raises(ValueError, match="runs under protocol context, found prompt"):
        run(subject, load(tmp_path, mode="shared"), "full", "prompt")


def test_losses_alone_need_gold_answers_in_the_conversation(subject, tmp_path) -> None:
    (arm,) = arms.make_arms(["full"])
    task, silent = data.load_tasks(["scbench_kv"])["scbench_kv"], Protocol("context", generate=False)
    with asymkv.replace("llama", arm.config, model=subject.model):
        record = measure(subject, arm, task, load(tmp_path), silent)
        assert "pred" not in record and record["nll"] > 0
        with pytest.raises(ValueError, match="so they must be generated"):
            measure(subject, arm, task, load(tmp_path, earlier="model"), silent)
