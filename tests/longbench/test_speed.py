"""The speed measurements: what a job returns, and the medians and ratios of the table."""

import json

import pytest
from transformers import LlamaConfig

from asymkv.longbench import speed

TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip


@pytest.mark.parametrize("arm", speed.speed_arms(48, 32))
def test_a_job_measures_every_arm_on_random_weights(tmp_path, arm):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()), encoding="utf-8")
    job = speed.SpeedJob(
        arm, speed.speed_arms(48, 32)[arm], str(tmp_path / "config.json"), tokens=256, chunk_size=32, decode_steps=3,
        repeats=2, dtype="float32",
    )  # fmt: skip
    result = json.loads(json.dumps(speed.run_job(job)))
    assert len(result["prefill_seconds"]) == len(result["decode_seconds"]) == 2
    assert result["peak_rss_bytes"] >= result["peak_rss_increase_bytes"] >= 0
    assert result["conditions"]["weights"] == "random"
    uncompressed = 2 * 2 * 2 * 8 * 256 * 4  # keys and values, layers, KV heads, head size, tokens, fp32
    assert result["peak_cache_bytes"] >= result["stored_bytes"]
    assert (result["stored_bytes"] >= uncompressed) == (arm in (speed.STOCK, speed.PLAIN))


def fixture_result(arm, prefills, rates, tokens=1024):
    job = {"arm": arm, "config": None, "tokens": tokens, "decode_steps": 10, "chunk_size": 512}
    nbytes = dict.fromkeys(("peak_rss_bytes", "peak_rss_increase_bytes", "peak_cache_bytes", "stored_bytes"), 2**20)
    times = {"prefill_seconds": prefills, "decode_seconds": [10 / rate for rate in rates]}
    return {"job": job, **times, **nbytes, "backend": "sdpa", "conditions": {"date": "d", "model": "m"}}


def test_medians_and_ratios():
    results = [fixture_result("stock", [1.0], [20]), fixture_result("full", [2.0, 4.0], [10])]
    results += [fixture_result("full", [9.0], [12]), fixture_result("loss", [8.0], [40])]
    rows = {row["arm"]: row for row in speed.medians(results)}
    assert rows["full"]["prefill_seconds"] == 4.0
    assert rows["full"]["prefill_range"] == [2.0, 9.0]
    assert rows["loss"]["prefill_over_plain"] == 2.0
    assert rows["loss"]["decode_over_stock"] == pytest.approx(2.0)
    assert rows["full"]["decode_rate"] == pytest.approx(11)


def test_markdown_stands_without_reference_arms_and_decode():
    text = speed.markdown([fixture_result("loss", [8.0], [])])
    assert "| 1024 | loss | 8.00 (8.00–8.00) | – | 1.0 | 1.0 | 1.0 | – | – | sdpa |" in text
    assert "- model: m" in text
