"""The whole-model benchmark: caches of random rows behave as compressed ones, and no cell is lost or done twice."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from tiny_models import prompt, tiny_model
from transformers import LlamaConfig

import asymkv
from asymkv import CompressionConfig
from asymkv.longbench import compaction_share, model_speed
from asymkv.longbench.model_speed import OUT_OF_MEMORY, Cell
from asymkv.ops.bench import Options, Table
from scripts import bench_model

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(model_speed.RANDOM_MODELS, "tiny-random", TINY)
    return "tiny-random"


@pytest.mark.parametrize(("rows", "context"), [(1, 1), (7, 7), (48, 1000), (1, 9)])
def test_cardinalities_share_the_context(rows, context):
    n = model_speed.cardinalities(3, rows, context)
    assert n.shape == (3, rows) and (n >= 1).all() and (n.sum(1) == context).all()


def test_a_filled_cache_is_a_compressed_one_that_decode_goes_on_with():
    model = tiny_model()
    config = CompressionConfig(method="asymkv", budget=48, decode_interval=4)
    with asymkv.replace("llama", config, model=model):
        cache = model_speed.compressed_cache(model, config, 2, 1000, 48)
        assert cache.tokens_seen.tolist() == [1000, 1000] and (cache.num_rows(1) == 48).all()
        assert all(int(head[-1]) == 999 for row in cache.positions(0) for head in row)
        for token in prompt(8, batch=2).split(1, dim=1):
            model(token, past_key_values=cache)
    assert cache.tokens_seen.tolist() == [1008, 1008] and cache.compactions == 2
    stats = cache.stats()
    assert stats["represented_tokens"] == 1008 * 2 * 2 * 2 and stats["max_rows"] == 48


def test_a_cache_of_more_rows_than_tokens_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="from 1 to the 9 tokens"):
        model_speed.compressed_cache(model, CompressionConfig(budget=48), 1, 9, 48)


@pytest.mark.parametrize("arm", model_speed.ARMS)
def test_a_cell_measures_time_and_memory(tiny, arm):
    row = model_speed.guarded(Cell(arm, tiny, 2, 600, budget=64, steps=3, dtype="float32"))
    assert row["status"] == "ok" and float(row["ms per token"]) > 0 and float(row["peak MiB"]) >= 0
    held = 2 * 2 * 2 * 2 * 8 * 4 / 2**20  # batch, layers, KV heads, keys and values, head size, fp32
    assert (float(row["cache MiB"]) > 550 * held) == (arm == model_speed.STOCK)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")], ids=str)  # fmt: skip
def test_a_cell_that_does_not_fit_says_so(error, monkeypatch):
    monkeypatch.setattr(model_speed, "measure", lambda cell: (_ for _ in ()).throw(error))
    assert model_speed.guarded(Cell("asymkv", "x", 1, 9))["status"] == OUT_OF_MEMORY


def test_other_errors_are_errors(monkeypatch):
    monkeypatch.setattr(model_speed, "measure", lambda cell: (_ for _ in ()).throw(RuntimeError("no such kernel")))
    with pytest.raises(RuntimeError, match="no such kernel"):
        model_speed.guarded(Cell("asymkv", "x", 1, 9))


def test_the_script_records_cells_that_do_not_fit_and_runs_none_again(tmp_path, monkeypatch):
    ran = []

    def run(cell):
        ran.append(cell)
        ok = {**model_speed.out_of_memory(), "status": "ok", "ms per token": "1.5", "peak MiB": "2"}
        return ok if cell.context < 9000 else model_speed.out_of_memory()

    monkeypatch.setattr(bench_model, "run_in_process", run)
    command = ["--out", str(tmp_path), "--contexts", "4096,16384", "--batches", "1,4"]
    bench_model.main(command)
    bench_model.main(command)
    rows = list(csv.DictReader((tmp_path / "model.csv").open()))
    assert len(ran) == len(rows) == 8
    assert [r["status"] for r in rows if r["context"] == "16384"] == [OUT_OF_MEMORY] * 4
    assert {c.steps for c in ran if c.arm == "asymkv"} == {128} and {c.steps for c in ran if c.arm != "asymkv"} == {16}
    assert (tmp_path / "model.png").exists() and OUT_OF_MEMORY in (tmp_path / "model.md").read_text()
    assert json.loads((tmp_path / "conditions.json").read_text())["budget"] == 2048


@pytest.mark.parametrize(("code", "fails"), [(-9, False), (1, True)])
def test_a_worker_that_was_killed_ran_out_of_memory(code, fails, monkeypatch):
    monkeypatch.setattr(bench_model.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code))
    cell = Cell("asymkv", "x", 1, 9)
    if fails:
        with pytest.raises(subprocess.CalledProcessError):
            bench_model.run_in_process(cell)
    else:
        assert bench_model.run_in_process(cell)["status"] == OUT_OF_MEMORY


def test_a_worker_runs_its_cell(tmp_path):
    cell = {"arm": "DynamicCache", "model": "smollm2-random", "batch": 1, "context": 16, "steps": 1}
    command = [sys.executable, bench_model.__file__, "--worker", json.dumps(cell), str(tmp_path / "r.json")]
    subprocess.run(command, check=True)
    assert json.loads((tmp_path / "r.json").read_text())["status"] == "ok"


def test_random_models_have_the_sizes_of_their_names():
    found = LlamaConfig(**model_speed.RANDOM_MODELS["llama-3.1-8b-random"])
    assert (found.hidden_size, found.num_hidden_layers, found.head_dim, found.rope_parameters["factor"]) == (
        4096, 32, 128, 8.0)  # fmt: skip
    assert LlamaConfig(**model_speed.RANDOM_MODELS["smollm2-random"]).num_key_value_heads == 3


def test_compaction_is_a_share_of_a_chunk(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compaction_share, "BUDGET", 96)
    monkeypatch.setattr(compaction_share, "CHUNK", 32)
    table = Table(tmp_path / "compaction_share.csv")
    compaction_share.bench_compaction_share(table, Options(torch.device("cpu"), ["float32"], [], repeats=1), tiny)
    shares = {row["way"]: float(row["share of the forward"]) for row in table.rows}
    assert shares[compaction_share.FORWARD] == 1
    assert shares[compaction_share.JUDGE] > 0 and shares[compaction_share.MERGE] > 0
