"""CompressionConfig: validated, round-trips, shipped files load."""

import copy
import dataclasses
import pickle

import pytest
import yaml

from asymkv import CompressionConfig, replace
from asymkv.budgets import CacheShape, capacity_for, parse_bytes, resolve_rows, rows_for_bytes
from asymkv.methods import METHODS
from asymkv.paths import config_root

SHIPPED = sorted(p.stem for p in (config_root() / "methods").glob("*.yaml"))


@pytest.mark.parametrize(("settings", "message"), [
    ({"budget": 36}, "smaller than sink_size . window_size . 1 = 37"),
    ({"budget": 0, "sink_size": 0, "window_size": 0}, "= 1"),
    ({"budget": 1.5}, "rows per KV head"),
    ({"budget": True}, "rows per KV head"),
    ({"budget": "12 parsecs"}, "not a size: '12 parsecs'.*MiB"),
    ({"ratio": 0}, r"\(0, 1\]; found 0"),
    ({"ratio": 1.01}, "found 1.01"),
    ({"ratio": 0.5, "budget": 100}, "not both"),
    ({"chunk_size": 0}, "chunk_size must be an integer >= 1; found 0"),
    ({"decode_interval": -1}, "decode_interval must be an integer >= 0; found -1"),
    ({"sink_size": 2.0}, "sink_size"),
    ({"position_policy": "rotary"}, "'rotary'; allowed.*compact"),
    ({"backend": "cuda"}, "unknown backend 'cuda'; allowed.*sdpa"),
    ({"head_budgets": "fair"}, "unknown head_budgets 'fair'; allowed.*uniform"),
    ({"layer_budgets": {"kind": "uniform", "beta": 2}}, "unknown keys .'beta'."),
    ({"method": "asymkw"}, "unknown method 'asymkw'; registered.*streaming_llm"),
    ({"window": 3}, "unknown settings .'window'.; allowed.*window_size"),
    ({"method": "h2o", "curvature": "loss"}, "unknown settings .'curvature'..*normalize"),
    ({"curvature": "hessian"}, "curvature='hessian'; allowed.*output"),
    ({"pair_rule": "cosine"}, "pair_rule='cosine'; allowed"),
    ({"cardinality_factor": 1}, "must be True or False; found 1"),
    ({"max_queries": 0}, "max_queries"),
    ({"method": "asymkv_evict", "upstream_compat": True}, "allowed: False"),
    ({"method": "asymkv_symmetric", "upstream_compat": True}, "allowed: False"),
    ({"method": "asymkv", "key_weights": "sum"}, "'mean'"),
], ids=lambda x: str(x)[:40])  # fmt: skip
def test_bad_settings_name_what_was_found_and_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**settings)
    with pytest.raises(ValueError, match=message):
        replace("llama", **settings)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompressionConfig().budget = 3


def test_no_protected_rows_is_legal():
    config = CompressionConfig(budget=1, sink_size=0, window_size=0)
    assert config.minimum_rows == 1


def test_without_budget_and_ratio_2048_rows():
    assert CompressionConfig().budget == 2048 and CompressionConfig(ratio=0.5).budget is None


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_load_and_round_trip(name):
    config = CompressionConfig.load(name)
    assert CompressionConfig(**config.to_dict()) == config
    assert config.method in METHODS


def test_every_method_has_a_shipped_file():
    assert set(METHODS) <= set(SHIPPED)


def test_load_takes_paths_and_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"method": "h2o", "ratio": 0.5}))
    assert CompressionConfig.load(path).ratio == 0.5
    assert CompressionConfig.load(path, budget=100).ratio is None
    path.write_text("- a list")
    with pytest.raises(ValueError, match="mapping"):
        CompressionConfig.load(path)
    with pytest.raises(ValueError, match="shipped names.*asymkv_upstream"):
        CompressionConfig.load("asymkv_v2")


def test_replace_switches_between_budget_and_ratio_and_methods():
    config = CompressionConfig(ratio=0.25, curvature="loss")
    assert config.replace(budget=99).ratio is None
    other = config.replace(method="h2o")
    assert other.ratio == 0.25 and other.options.normalize is False


def test_replace_sets_a_methods_defaults_anew():
    config = CompressionConfig("kvzip", sink_size=6)
    assert (config.layer_budgets, config.window_size) == ("global", 0)
    assert config.replace(level="pair_uniform").layer_budgets == "uniform"
    other = config.replace(method="h2o")
    assert other == CompressionConfig("h2o", sink_size=6) and other.replace(method="kvzip") == config


@pytest.mark.parametrize(("text", "size"), [("512MiB", 2**29), ("1.5 GB", 1_500_000_000), ("7b", 7), ("2KiB", 2048)])
def test_sizes(text, size):
    assert parse_bytes(text) == size


def test_rows_for_bytes_are_the_most_that_fit():
    shape = CacheShape(layers=3, kv_heads=2, row_bytes=100)
    for total in (20_000, 100_000, 1_234_567, 10**8):
        rows = rows_for_bytes(total, shape)
        assert capacity_for(rows) * 600 <= total < capacity_for(rows + 2) * 600


def test_ratio_floors_exactly():
    shape = CacheShape(1, 1, 1)
    rows, raised = resolve_rows(None, 0.29, 5, [100, 10, 17], shape)
    assert rows == [29, 5, 5] and raised == [False, True, True]


def test_byte_budget_below_the_minimum_says_what_it_is_in_rows():
    with pytest.raises(ValueError, match=r"is 0 rows per KV head here \(3 layers"):
        resolve_rows("5KB", None, 37, [100], CacheShape(3, 2, 100))


def test_a_config_is_a_dataclass_to_everyone():
    """``dataclasses.replace``, the method's settings as attributes, and hashing, with mappings too."""
    config = CompressionConfig("asymkv", budget=128, head_budgets={"kind": "adaptive"})
    other = dataclasses.replace(config, budget=64, curvature="output")
    assert (other.budget, other.curvature, config.curvature) == (64, "output", "cardinality")
    assert other == CompressionConfig("asymkv", budget=64, head_budgets={"kind": "adaptive"}, curvature="output")
    assert dataclasses.replace(config, method="h2o").normalize is False
    assert len({config, other, copy.deepcopy(config), pickle.loads(pickle.dumps(config))}) == 2
    with pytest.raises(AttributeError, match="has no attribute 'normalize'"):
        config.normalize  # noqa: B018
    assert len({CompressionConfig("snapkv", ratio=1), CompressionConfig("snapkv", ratio=1.0)}) == 1
    with pytest.raises(ValueError, match="as keyword arguments of their own; found options={'kernel_size': 3}"):
        CompressionConfig("snapkv", options={"kernel_size": 3})


def test_a_truth_value_is_no_ratio():
    with pytest.raises(ValueError, match=r"in \(0, 1\]; found True"):
        CompressionConfig("h2o", ratio=True)
