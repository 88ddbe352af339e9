"""A model spread over memory and disk gives the records of the plain one, through the same script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from longbench_files import load_script, merged_but_for_times, pred_arguments, write_inputs

from asymkv.longbench import models
from asymkv.offload import weight_of

# Embedding, first layer and head rest on disk: ids, attention and logits all meet weights that are elsewhere.
SPREAD = {
    "model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip
# A merge, and a method that reads the weights of the output projection itself.
METHODS = "full,asymkv,criticalkv"


def test_a_model_on_disk_gives_the_records_of_a_plain_one(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    inputs, pred = write_inputs(tmp_path, rows=2), load_script("pred")
    plain, spread = tmp_path / "plain", tmp_path / "spread"
    pred.main(pred_arguments(inputs, tiny_folder, plain, "--method", METHODS))
    more = ["--method", METHODS, "--device-map", json.dumps(SPREAD), "--offload-folder", str(tmp_path / "offload")]
    pred.main(pred_arguments(inputs, tiny_folder, spread, *more))
    assert merged_but_for_times(spread) == merged_but_for_times(plain)
    run = json.loads((spread / "asymkv" / "run.json").read_text(encoding="utf-8"))
    assert run["settings"]["device"] == "cpu+disk" and run["conditions"]["device_map"]["lm_head"] == "disk"
    assert run["results"]["kept_ratio"] < 0.6
    with pytest.raises(ValueError, match="holds results of other settings: device differ"):
        pred.main(pred_arguments(inputs, tiny_folder, plain, *more))


def test_inputs_go_where_the_embedding_is_computed(tiny_folder: Path) -> None:
    pytest.importorskip("accelerate")
    spec = models.ModelSpec("tiny", str(tiny_folder), 100)
    spread = models.load_model(spec, placement=models.Placement(SPREAD))
    assert spread.device.type == "meta" and models.input_device(spread) == torch.device("cpu")
    assert models.devices_of(spread) == [torch.device("cpu")] and models.device_label(spread) == "cpu+disk"
    small = models.Placement("auto", {"cpu": "1KB"})
    assert models.device_label(models.load_model(spec, placement=small)) == "cpu+disk"
    plain = models.load_model(spec)
    assert models.input_device(plain) == torch.device("cpu") and models.device_label(plain) == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-map", "spread"], "a device map is JSON or one of auto, balanced.*found 'spread'"),
        (["--device-map", "{"], "the device map '{' is not JSON"),
        (["--device-map", "auto", "--max-memory", "[1]"], r"the devices must be a JSON object, found '\[1\]'"),
        (["--offload-folder", "x"], "belong to --device-map"),
        (["--device-map", '{"": "cpu", "model.nothing": "cpu"}'], r"the device map names \['model.nothing'\]"),
    ],
)
def test_a_spread_that_cannot_be_is_refused(
    arguments: list[str], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match=message):
        load_script("pred").main(pred_arguments(write_inputs(tmp_path, rows=1), tiny_folder, tmp_path, *arguments))


def test_ranks_of_one_node_do_not_spread_over_each_others_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pred = load_script("pred")
    args = pred.parse_args(["--out", "x", "--device-map", "auto", "--offload-folder", "w"])
    ranks = pred.runner.Ranks(1, 2, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--device-map auto takes all devices of a node"):
        pred.placement(args, ranks)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pred.placement(args, ranks) == models.Placement("auto", None, "w/rank1")


def test_a_weight_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="weight of Linear is on the meta device and nothing says where"):
        weight_of(torch.nn.Linear(2, 2, device="meta"))
