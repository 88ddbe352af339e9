"""What is wrong with an experiment's yaml is said with the file, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from asymkv.longbench.fidelity_experiment import load_experiment

FULL, WINDOW = {"name": "full", "method": "full"}, {"name": "window", "method": "streaming_llm"}
GOOD = {"name": "x", "sample": "s.json", "ratios": [0.5], "arms": [FULL, WINDOW]}


def write(folder: Path, table: object) -> Path:
    path = folder / "broken.yaml"
    path.write_text(yaml.safe_dump(table), encoding="utf-8")
    return path


def with_arm(**arm: object) -> dict:
    return {**GOOD, "arms": [FULL, WINDOW, arm]}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([1], r"must be a mapping, found list \[1\]"),
        ({k: v for k, v in GOOD.items() if k != "ratios"}, " lacks ratios; it has arms, name, sample"),
        ({"name": "x", "ratios": [0.5]}, " lacks sample, arms; it has name, ratios"),
        ({**GOOD, "armz": []}, r": unknown keys \['armz'\]; allowed: .*'arms'.*'texts'"),
        ({**GOOD, "ratios": 0.5}, r": ratios must be a list of numbers in \(0, 1\], found float 0.5"),
        ({**GOOD, "ratios": [25]}, r": ratios must be a list of numbers in \(0, 1\], found list \[25\]"),
        ({**GOOD, "arms": FULL}, ": arms must be a list of mappings, found dict"),
        ({**GOOD, "arms": ["full"]}, ", arm 0 must be a mapping, found str 'full'"),
        ({**GOOD, "defaults": 3}, ", defaults must be a mapping, found int 3"),
        ({**GOOD, "texts": {"prefix": 9}}, r", texts: unknown keys \['prefix'\]; allowed: \['prefix_tokens', "),
        ({**GOOD, "texts": {"windows": 0}}, ", texts: windows must be an integer >= 1; found 0"),
        (with_arm(method="h2o"), ", arm 2 lacks name; it has method"),
        (with_arm(name="a", methd="h2o"), r"arm 2 \(a\) has neither method nor press; .*\['methd'\]; methods: .*'h2o'"),
        (with_arm(name="a", method="h20"), r"arm 2 \(a\): unknown method 'h20'; methods: .*'h2o'"),
        (with_arm(name="a", method="h2o", normalise=True), r"\(a\): unknown keys \['normalise'\]; .*'normalize'"),
        (with_arm(name="a", method="h2o", ratio=0.5), r"\(a\): unknown keys \['ratio'\]"),
        ({**GOOD, "defaults": {"windw": 8}}, r"arm 1 \(window\): unknown keys \['windw'\]; allowed: .*'window_size'"),
        (with_arm(**WINDOW), ": arms need names of their own"),
        ({**GOOD, "arms": [WINDOW]}, ": exactly one arm must have method 'full'"),
        (with_arm(name="a", method="h2o", compare=["b"]), r": a is compared with \('b',\); the arms are \['full', "),
        (with_arm(name="a", method="h2o", compare="window"), r"\(a\): compare must be a list of arms, found str 'wind"),
    ],
)
def test_a_wrong_experiment_is_named(tmp_path: Path, table: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_experiment(write(tmp_path, table))
    assert str(raised.value).startswith("broken.yaml")


def test_an_arm_may_take_its_method_from_the_defaults_and_a_press_any_argument(tmp_path: Path) -> None:
    arms = [FULL, {"name": "a"}, {"name": "p", "press": "SnapKVPress", "window_size": 9}]
    experiment = load_experiment(write(tmp_path, {**GOOD, "arms": arms, "defaults": {"method": "h2o"}}))
    assert [arm.settings for arm in experiment.arms[1:]] == [
        {"method": "h2o"},
        {"press": "SnapKVPress", "window_size": 9},
    ]


def test_an_arm_that_the_experiment_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown arms \['nothing'\]; x has full, window"):
        load_experiment(write(tmp_path, GOOD)).cells(["nothing"])
