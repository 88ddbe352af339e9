"""The runner: ranks share the rows, a kill loses nothing, other settings and silent non-compression are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from asymkv.longbench import arms, data, models, runner
from asymkv.longbench.measure import Protocol, greedy, measure

PRED = Path(__file__).parents[2] / "scripts" / "pred.py"
ROWS, METHODS, TASK = 8, ("full", "streaming_llm"), "qasper"
PROTOCOL = Protocol("context", max_new_tokens=12)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with one task, and LongBench-like config beside it."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"input": f"{i}?", "context": f"{i} " * 60, "answers": [f"a{i}"], "length": 60, "_id": f"row{i}"}
        for i in range(ROWS)
    ]
    (folder / f"{TASK}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "dataset2prompt.json").write_text(json.dumps({TASK: "{context}\n{input}"}), encoding="utf-8")
    (folder / "dataset2maxlen.json").write_text(json.dumps({TASK: 24}), encoding="utf-8")
    return folder


def make_work(inputs: Path, *, ratio: float = 0.5, methods: tuple[str, ...] = METHODS) -> runner.Work:
    made = arms.make_arms(methods, ratio=ratio, settings={"": {"sink_size": 2, "window_size": 8}})
    return runner.Work(made, data.load_tasks([TASK], inputs), {TASK: data.load_rows(TASK, data_dir=inputs)}, PROTOCOL)


@pytest.fixture
def subject(tiny_folder: Path):
    spec = models.resolve_spec(str(tiny_folder), max_length=500)
    return runner.load_subject(spec, torch.device("cpu"), "float32")


ALONE = runner.Ranks(0, 1, torch.device("cpu"))


def start(inputs: Path, model: Path, out: Path, *launcher: str) -> subprocess.Popen:
    """The settings of `make_work`, through the script."""
    command = [sys.executable, *launcher, str(PRED), "--model", str(model), "--max-length", "500"]
    command += ["--dtype", "float32", "--device", "cpu", "--threads", "1", "--out", str(out)]
    command += ["--data-dir", str(inputs), "--datasets", TASK, "--longbench-config", str(inputs)]
    command += ["--methods", ",".join(METHODS), "--ratio", "0.5", "--set", "sink_size=2", "--set", "window_size=8"]
    command += ["--protocol", PROTOCOL.name, "--max-new-tokens", "12"]
    path = os.pathsep.join([str(PRED.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def kill_after_some_rows(process: subprocess.Popen, out: Path) -> None:
    while process.poll() is None and len(stored_lines(out)) < 3:
        time.sleep(0.01)
    process.kill()
    process.communicate()


def stored_lines(out: Path) -> list[str]:
    return [line for path in out.glob("*/records-*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_killed_run_is_finished_by_two_ranks_that_cover_every_row_once(
    inputs: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    kill_after_some_rows(start(inputs, tiny_folder, tmp_path), tmp_path)
    before = stored_lines(tmp_path)
    assert 3 <= len(before) < ROWS * len(METHODS)
    with (tmp_path / "full" / "records-0of1.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"index": 4, "data')

    again = start(inputs, tiny_folder, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert again.wait(timeout=120) == 0, again.stderr.read()

    after = [line for line in stored_lines(tmp_path) if line.endswith("}")]
    assert set(before) <= set(after) and len(after) == ROWS * len(METHODS)
    for method in METHODS:
        merged = data.read_jsonl(tmp_path / method / f"{TASK}.jsonl")
        assert [(row["index"], row["_id"]) for row in merged] == [(i, f"row{i}") for i in range(ROWS)]
        for rank in (0, 1):
            mine = data.read_jsonl(tmp_path / method / f"records-{rank}of2.jsonl")
            assert {row["index"] % 2 for row in mine} <= {rank}
        run = json.loads((tmp_path / method / "run.json").read_text(encoding="utf-8"))
        assert run["results"]["datasets"][TASK]["rows"] == ROWS and run["conditions"]["world_size"] == 2


def test_a_finished_run_is_not_run_again(inputs: Path, subject, tmp_path: Path, monkeypatch) -> None:
    runner.run(make_work(inputs), subject, tmp_path, ALONE)
    lines = stored_lines(tmp_path)
    monkeypatch.setattr(runner, "measure", lambda *_: pytest.fail("a row was measured twice"))
    runner.run(make_work(inputs), subject, tmp_path, ALONE)
    assert stored_lines(tmp_path) == lines


def test_other_settings_in_the_same_folder_are_refused_by_name(inputs: Path, subject, tmp_path: Path) -> None:
    runner.run(make_work(inputs, methods=("streaming_llm",)), subject, tmp_path, ALONE)
    with pytest.raises(ValueError, match=r"config\.ratio"):
        runner.run(make_work(inputs, methods=("streaming_llm",), ratio=0.25), subject, tmp_path, ALONE)
    fewer = make_work(inputs, methods=("streaming_llm",))
    fewer.rows[TASK].pop()
    with pytest.raises(ValueError, match=rf"rows\.{TASK}"):
        runner.run(fewer, subject, tmp_path, ALONE)


@pytest.mark.parametrize("protocol", ["prompt", "context"])
def test_a_record_tells_what_was_stored(protocol: str, inputs: Path, subject) -> None:
    import asymkv

    work = make_work(inputs)
    task, row = work.tasks[TASK], work.rows[TASK][0]
    for arm in work.arms:
        with asymkv.replace("llama", arm.config, model=subject.model):
            record = measure(subject, arm, task, row, Protocol(protocol, max_new_tokens=4))
        tokens = record["tokens_seen"]
        assert tokens == record["prompt_tokens"] and (protocol == "context") == (record["question_tokens"] > 0)
        expected = tokens if arm.name == "full" else tokens // 2
        assert record["rows_min"] == record["rows_max"] == expected
        assert record["full_bytes"] == 2 * 2 * 2 * 8 * 4 * tokens
        assert record["stored_bytes"] >= record["full_bytes"] * expected / tokens
        # one token a byte: a space and "a0"
        assert record["gold_tokens"] == 3 and record["nll"] > 0 and record["new_tokens"] <= 4


def test_an_uncompressed_cache_does_not_pass_for_a_compressed_one(inputs: Path, subject) -> None:
    import asymkv

    work = make_work(inputs)
    full, compressed = work.arms
    with (
        asymkv.replace("llama", full.config, model=subject.model),
        pytest.raises(arms.StoredTooMuchError, match="streaming_llm holds"),
    ):
        measure(subject, compressed, work.tasks[TASK], work.rows[TASK][0], PROTOCOL)


def test_the_none_arm_sees_no_context(inputs: Path, subject) -> None:
    import asymkv

    work = make_work(inputs, methods=("none",))
    with asymkv.replace("llama", work.arms[0].config, model=subject.model):
        records = [measure(subject, work.arms[0], work.tasks[TASK], row, PROTOCOL) for row in work.rows[TASK][:2]]
    assert [r["prompt_tokens"] for r in records] == [1, 1]


def test_greedy_matches_generate(inputs: Path, subject) -> None:
    import asymkv

    ids = subject.tokenizer("some text to go on with", return_tensors="pt").input_ids
    with asymkv.replace("llama", arms.make_arms(["full"])[0].config, model=subject.model):
        expected = subject.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        out = subject.model(ids, use_cache=True, logits_to_keep=1)
        said, fed = greedy(subject.model, out.past_key_values, out.logits[0, -1], 8, frozenset())
    assert said == expected and fed == 7


def test_an_answer_that_must_not_be_empty_does_not_start_with_a_stop(subject) -> None:
    import asymkv

    ids = subject.tokenizer("text", return_tensors="pt").input_ids
    with asymkv.replace("llama", arms.make_arms(["full"])[0].config, model=subject.model):
        out = subject.model(ids, use_cache=True, logits_to_keep=1)
        first = int(out.logits[0, -1].argmax())
        cache = out.past_key_values
        assert greedy(subject.model, cache.fork(), out.logits[0, -1], 3, frozenset({first})) == ([], 0)
        assert greedy(subject.model, cache, out.logits[0, -1], 3, frozenset({first}), not_empty=True)[0]


def test_settings_reach_all_arms_or_one() -> None:
    settings = arms.parse_settings(["window_size=8", "streaming_llm.sink_size=1"])
    made = {
        arm.name: arm.config for arm in arms.make_arms(["full", "h2o", "streaming_llm"], ratio=0.5, settings=settings)
    }
    assert made["h2o"].window_size == made["streaming_llm"].window_size == 8
    assert made["streaming_llm"].sink_size == 1 and made["h2o"].sink_size == 4
    with pytest.raises(ValueError, match="unknown arms \\['tova'\\]"):
        arms.make_arms(["full"], settings=arms.parse_settings(["tova.sink_size=1"]))
