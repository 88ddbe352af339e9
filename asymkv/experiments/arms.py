"""What is compared: methods at one size, and one method's numbers varied one at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from asymkv.config import CompressionConfig
from asymkv.paths import config_path

OURS = "ours"
ALIASES = {OURS: "aagc", "dynamickv": "dynamic_kv", "razor_attention": "razor"}
METHOD_GROUP, STEP_GROUP = "methods", "steps"
SUITE_KEYS = {"method", "defaults", "grids", "steps"}
OF_A_STEP = ("name", "distilled", "against")  # what a step says beside its settings
Cell = tuple[str, str, dict[str, Any], dict[str, str | None]]  # name, group, settings, other fields of a SuiteArm
PRUNE_ONLY = "budget"  # value of a setting that follows the arm's budget


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers that the command line gives.

    Args:
        budget: rows per KV head of the arms that compress.
        stride: own tokens between two compactions; methods that judge a whole prompt get turns of so many.
        own: further settings of single methods, by registered name.
    """

    budget: int
    stride: int
    own: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SuiteArm:
    """One row of the results.

    Args:
        name: in tables and records.
        group: "methods", "steps", or the setting that is varied.
        config: of the cache.
        stride: own tokens of a forward.
        checkpoint: weights to measure with, None = the model as it is.
        weights: sha256 of the checkpoint, once it has been looked at.
        against: a step that this one is compared with, None = the one before it.
    """

    name: str
    group: str
    config: CompressionConfig
    stride: int
    checkpoint: str | None = None
    weights: str | None = None
    against: str | None = None

    @property
    def identity(self) -> str:
        """Equal for arms that are measured alike, whatever their names."""
        config = self.config.to_dict() | {"positions": self.config.positions}
        return json.dumps([config, self.stride, self.weights or self.checkpoint], sort_keys=True, default=str)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Arms that can run, and why others cannot, by name."""

    arms: list[SuiteArm]
    refused: dict[str, str]

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.arms + other.arms, {**self.refused, **other.refused})


def method_arms(names: Sequence[str], sizes: Sizes) -> Plan:
    """Arms of the named methods, all at the same number of rows.

    Args:
        names: "full", "ours" (AAGC), any registered method, or a settings file's name or path.
        sizes: the numbers.

    Raises:
        ValueError: for a name that comes twice.
    """
    labels = [Path(name).stem if name.endswith(".yaml") else name for name in names]
    if len(set(labels)) < len(labels):
        raise ValueError(f"methods must be named once; found {labels}")
    return _plan((label, METHOD_GROUP, _settings(n, sizes), {}) for label, n in zip(labels, names, strict=True))


def _settings(name: str, sizes: Sizes) -> dict[str, Any]:
    """Keyword arguments of a method's configuration."""
    method = ALIASES.get(name, name)
    own = dict(sizes.own.get(method, {}))
    size = {} if own.keys() & {"budget", "ratio"} else {"budget": sizes.budget}
    return {"method": method, **size, "stride": sizes.stride, **own}


def load_suite(path_or_name: str | Path) -> dict[str, Any]:
    """A yaml of ablations: the ``method``, its ``defaults``, ``grids`` (setting: values) and ``steps``.

    Raises:
        ValueError: for unknown keys, a step without a name, or one that is compared with a step that there is not.
    """
    path = Path(path_or_name)
    path = path if path.is_file() else config_path(f"comparisons/{path_or_name}.yaml")
    suite = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(suite, dict) or set(suite) - SUITE_KEYS or "method" not in suite:
        found = sorted(suite) if isinstance(suite, dict) else type(suite).__name__
        raise ValueError(f"{path.name} must hold a mapping of {sorted(SUITE_KEYS)} with a method; found {found}")
    unnamed = [step for step in suite.get("steps", []) if "name" not in step]
    if unnamed:
        raise ValueError(f"{path.name}: steps need names; found {unnamed}")
    names = [step["name"] for step in suite.get("steps", [])]
    for step in suite.get("steps", []):
        others = [name for name in names if name != step["name"]]
        if step.get("against") not in (None, *others):
            raise ValueError(f"{path.name}: {step['name']!r} can be compared with {others}; found {step['against']!r}")
    return suite


def ablation_arms(suite: Mapping[str, Any], sizes: Sizes, checkpoint: str | None = None) -> Plan:
    """Arms of an ablation: every value of every grid, the other settings as they are, then the steps.

    Args:
        suite: from :func:`load_suite`; a value "budget" is the arm's budget. A step with ``distilled: true`` runs on
            the checkpoint, and is refused without one; one with a ``method`` has that method's settings.
        sizes: the numbers that the grids vary around.
        checkpoint: weights that were trained under compression.
    """
    method = suite["method"]
    base = {**_settings(method, sizes), **suite.get("defaults", {}), **sizes.own.get(ALIASES.get(method, method), {})}
    cells: list[Cell] = [
        (f"{setting}={value}", setting, {**base, setting: value}, {})
        for setting, values in suite.get("grids", {}).items()
        for value in values
    ]
    plan = _plan(cells)
    steps, missing = [], {}
    for step in suite.get("steps", []):
        own = {k: v for k, v in step.items() if k not in OF_A_STEP}
        of_method = _settings(own["method"], sizes) if "method" in own else base
        told = {"against": step.get("against"), "checkpoint": checkpoint if step.get("distilled") else None}
        if step.get("distilled") and checkpoint is None:
            missing[step["name"]] = "no checkpoint of scripts/train.py was given (--checkpoint)"
        else:
            steps.append((step["name"], STEP_GROUP, {**of_method, **own, "method": of_method["method"]}, told))
    return plan + _plan(steps) + Plan([], missing)


def _plan(cells: Iterable[Cell]) -> Plan:
    arms, refused = [], {}
    for name, group, settings, told in cells:
        try:
            arms.append(_arm(name, group, settings, **told))
        except ValueError as error:
            refused[name] = str(error)
    return Plan(arms, refused)


def _arm(name: str, group: str, settings: dict[str, Any], **told: str | None) -> SuiteArm:
    given = {k: (settings["budget"] if v == PRUNE_ONLY else v) for k, v in settings.items()}
    stride, method = given.pop("stride"), given.pop("method")
    config = CompressionConfig.named(method, **given)
    if config.options.compresses and "whole_prompt" not in config.options.needs:
        # What reads in chunks compacts after each of them; a chunk that is given, or set by the method, stays.
        config = config if config.chunk_size is not None else config.replace(chunk_size=stride)
        stride = config.chunk or stride
    return SuiteArm(name, group, config, stride, **told)
