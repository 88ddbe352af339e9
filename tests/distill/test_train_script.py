"""scripts/train.py from a folder of weights to trained ones; one process and two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import asymkv
from asymkv.fingerprint import fingerprint
from scripts import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    """Arguments of a run on a tiny model and text."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text.write_text(" ".join(f"w{i % 97}" for i in range(72 * 22)))
    flags = {
        "model_name_or_path": model, "train_file": text, "max_length": 72, "max_cache_size": 40, "num_clusters": 10,
        "pruning_interval": 32, "lookback_window": 16, "warmup_steps": 0, "learning_rate": 1e-3, "max_steps": 2,
        "train_batch_size": 2, "output_dir": tmp_path / "out",
    }  # fmt: skip

    def argv(*extra, **changes):
        given = {**flags, **changes}
        return ["--cpu", "--set", "window_size=8", *[str(x) for k, v in given.items() for x in (f"--{k}", v)], *extra]

    return argv


def test_a_run_leaves_a_model_and_its_settings(run, tmp_path, capsys):
    assert train.main(run()) == 0
    out = tmp_path / "out"
    config = asymkv.CompressionConfig.load(out / "final_model" / "compression.yaml")
    assert (config.method, config.budget, config.options.num_clusters, config.chunk) == ("aagc", 40, 10, 32)
    model = AutoModelForCausalLM.from_pretrained(out / "final_model")
    assert not torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"perplexity", "perplexity_full"} <= set(log[-1])
    told = json.loads((out / "run.json").read_text())
    assert told["arguments"]["max_steps"] == 2 and told["cache"] == config.to_dict()
    assert told["model"] == fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), any_dtype=True)
    assert told["texts"]["train"]["blocks"] > told["texts"]["val"]["blocks"] > 0
    assert [set(start) for start in told["starts"]] == [{"date", "commit", "versions", "device_name", "threads"}]
    assert "perplexity" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds checkpoints of another run, up to checkpoint-2; give --resume"):
        train.main(run(max_steps=1))
    assert json.loads((out / "run.json").read_text()) == told


def test_adapters_and_resume(run, tmp_path):
    """Two updates, then two more after --resume, as four at once."""
    pytest.importorskip("peft")
    lora = ("--lora", "--lora_rank", "2", "--gradient_checkpointing", "--bf16")
    train.main(run(*lora, max_steps=4, save_steps=2))
    whole = tmp_path / "out" / "final_model" / "adapter_model.safetensors"
    expected = whole.read_bytes()
    whole.unlink()
    for step in (tmp_path / "out").glob("checkpoint-4"):
        (step / "state.pt").unlink()  # as if it had been stopped before
    train.main(run(*lora, "--resume", max_steps=4, save_steps=2))
    assert whole.read_bytes() == expected


def test_other_methods_and_the_full_cache(run):
    args = train.parse_args(run("--method", "h2o"))
    assert train.compression(args).chunk == 32 and train.compression(args).method == "h2o"
    assert train.compression(train.parse_args(run("--no-use_compression"))).method == "full"


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_clusters": 35}, r"num_clusters \+ sink_size \+ recent rows = 35 \+ 4 \+ 10 exceed the budget of 40"),
    ({"lookback_window": 64}, "lookback_window must be at most pruning_interval=32.*found 64"),
    ({"max_length": 4096}, "--max_length 4096 is more than the 2048 positions of this model"),
    ({"max_length": 1500}, "holds one block of 1500 tokens and leaves none to validate on"),
], ids=str)  # fmt: skip
def test_bad_settings_are_named(run, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(run(**changes))


@pytest.mark.parametrize(("extra", "message"), [
    ("--bf16 --fp16", "give one of --bf16 and --fp16"),
    ("--evaluate_during_training --evaluation_strategy steps", "--evaluation_strategy steps needs --eval_steps"),
    ("--max_length 0", "--max_length must be at least 2"),
    ("--set window_size", "--set takes KEY=VALUE, such as window_size=8; found ['window_size']"),
])  # fmt: skip
def test_flags_that_do_not_go_together(run, extra, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(run(*extra.split()))
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_a_batch_twice_as_large(run, tmp_path):
    """gloo on the CPU: the same blocks per update, the same weights but for rounding."""
    train.main(run(train_batch_size=4))
    single = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_model")
    script = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "scripts" / "train.py")]
    command = [*script, *run(train_batch_size=2, output_dir=tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=600)
    double = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "final_model")
    for (name, a), b in zip(single.named_parameters(), double.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5), name


def test_settings_of_the_final_model_can_be_used_again(run, tmp_path):
    train.main(run(max_steps=1))
    final = tmp_path / "out" / "final_model"
    model = AutoModelForCausalLM.from_pretrained(final)
    with asymkv.replace("llama", final / "compression.yaml", model=model):
        assert model(torch.arange(3, 100)[None]).past_key_values.compactions > 0
    assert yaml.safe_load((final / "compression.yaml").read_text())["pruning_interval"] == 32
