"""What an experiment's yaml says: arms, the ratios they run at, the rows, and the windows of long texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from asymkv import CompressionConfig
from asymkv.checks import check_integer
from asymkv.config import setting_names
from asymkv.longbench.arms import FULL, NONE, Arm
from asymkv.longbench.jsonl import shown
from asymkv.longbench.press_arms import PressArm, PressSpec
from asymkv.methods import METHODS
from asymkv.paths import config_path

Cell = Arm | PressArm
NEEDED = ("name", "sample", "ratios", "arms")
ALLOWED = (*NEEDED, "texts", "defaults")
# Of an arm, beside its settings; and the settings that the experiment's ratios give.
ARM_KEYS, SIZES = {"name", "compare"}, {"ratio", "budget"}


@dataclasses.dataclass(frozen=True)
class ArmSettings:
    """A named configuration that runs at several ratios.

    Args:
        name: in tables and records.
        settings: keyword arguments of ``CompressionConfig``, or a press of kvpress as a mapping, without ``ratio``.
        references: arms that the report compares this one with, row by row.
        ratios: shares of rows kept that it runs at.
    """

    name: str
    settings: dict[str, Any]
    references: tuple[str, ...] = ()
    ratios: tuple[float, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether this is the full cache, which has no ratio."""
        return self.settings.get("method") == FULL

    @property
    def is_press(self) -> bool:
        """Whether this is a press of kvpress, which is measured in an environment of its own."""
        return "press" in self.settings

    def arm(self, ratio: float | None) -> Cell:
        """The arm at one ratio."""
        if self.is_press:
            return PressArm(self.name, PressSpec.from_mapping(self.settings), ratio)
        extra = {} if ratio is None else {"ratio": ratio}
        return Arm(self.name, CompressionConfig(**self.settings, **extra))


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """Windows of the long texts: tokens compressed, tokens scored after them, windows of each text."""

    prefix_tokens: int = 3072
    target_tokens: int = 256
    windows: int = 3


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a yaml file of ``configs/experiments/`` says.

    Args:
        name: of the experiment.
        sample: sample file, relative to the yaml's folder.
        ratios: shares of rows kept.
        arms: the arms; exactly one has ``method: full``.
        texts: windows of the long texts.
    """

    name: str
    sample: Path
    ratios: tuple[float, ...]
    arms: tuple[ArmSettings, ...]
    texts: TextSettings = TextSettings()

    def cells(self, names: Sequence[str] | None = None) -> list[Cell]:
        """The full cache first, then every arm (or the named ones) at every ratio.

        Raises:
            ValueError: for an unknown name; lists the arms.
        """
        unknown = sorted(set(names or ()) - {arm.name for arm in self.arms})
        if unknown:
            raise ValueError(f"unknown arms {unknown}; {self.name} has {', '.join(arm.name for arm in self.arms)}")
        full = [arm.arm(None) for arm in self.arms if arm.is_full]
        chosen = [arm for arm in self.arms if not arm.is_full and (not names or arm.name in names)]
        return full + [arm.arm(ratio) for arm in chosen for ratio in arm.ratios]


def load_experiment(path_or_name: str | Path) -> Experiment:
    """Reads an experiment's yaml, or a shipped one by name.

    Raises:
        ValueError: for keys that are missing or unknown (of the file, its texts, an arm), values of another kind, two
            arms of one name, an unknown reference, or not exactly one full-cache arm; names the file.
    """
    path = Path(path_or_name)
    path = path if path.is_file() else config_path(f"experiments/{path_or_name}.yaml")
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check_keys(path.name, table, allowed=ALLOWED, needed=NEEDED)
    ratios = _read_ratios(table["ratios"], path.name)
    if not isinstance(table["arms"], list):
        raise ValueError(f"{path.name}: arms must be a list of mappings, found {shown(table['arms'])}")
    defaults = table.get("defaults", {})
    _check_keys(f"{path.name}, defaults", defaults, allowed=None, needed=())
    arms = tuple(_read_arm(entry, defaults, ratios, f"{path.name}, arm {i}") for i, entry in enumerate(table["arms"]))
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names) or NONE in names:
        raise ValueError(f"{path.name}: arms need names of their own, and not {NONE!r}; found {names}")
    if sum(arm.is_full for arm in arms) != 1:
        raise ValueError(f"{path.name}: exactly one arm must have method {FULL!r}, the reference of all measures")
    for arm in arms:
        if set(arm.references) - set(names):
            raise ValueError(f"{path.name}: {arm.name} is compared with {arm.references}; the arms are {names}")
    texts = _read_texts(table.get("texts", {}), f"{path.name}, texts")
    return Experiment(table["name"], path.parent / table["sample"], ratios, arms, texts)


def join_experiments(experiments: Sequence[Experiment]) -> Experiment:
    """One experiment with the arms of several, each at its own ratios.

    Raises:
        ValueError: where they take different rows or windows, or mean different things by one arm's name.
    """
    first, arms = experiments[0], {}
    for one in experiments:
        for name in ("sample", "texts"):
            if getattr(one, name) != getattr(first, name):
                raise ValueError(f"{first.name} and {one.name} cannot be joined: their {name} differ")
        for arm in one.arms:
            if arms.setdefault(arm.name, arm) != arm:
                raise ValueError(f"{one.name}: arm {arm.name!r} has other settings in another experiment")
    if sum(arm.is_full for arm in arms.values()) != 1:
        raise ValueError(f"the full cache has one name in all experiments, found {list(arms)}")
    ratios = tuple(dict.fromkeys(ratio for one in experiments for ratio in one.ratios))
    name = "+".join(one.name for one in experiments)
    return dataclasses.replace(first, name=name, ratios=ratios, arms=tuple(arms.values()))


def _check_keys(place: str, table: Any, *, allowed: Iterable[str] | None, needed: Iterable[str]) -> None:
    """Raises ValueError for what is no mapping, or one with a key missing or (unless ``allowed`` is None) unknown."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{place} must be a mapping, found {shown(table)}")
    missing = [key for key in needed if key not in table]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}; it has {', '.join(map(str, table)) or 'nothing'}")
    unknown = [] if allowed is None else sorted(set(map(str, table)) - set(allowed))
    if unknown:
        raise ValueError(f"{place}: unknown keys {unknown}; allowed: {sorted(allowed or ())}")


def _read_ratios(found: Any, place: str) -> tuple[float, ...]:
    values = found if isinstance(found, list) else [None]
    if not all(type(value) in (int, float) and 0 < value <= 1 for value in values):
        raise ValueError(f"{place}: ratios must be a list of numbers in (0, 1], found {shown(found)}")
    return tuple(float(value) for value in values)


def _read_texts(found: Any, place: str) -> TextSettings:
    known = [field.name for field in dataclasses.fields(TextSettings)]
    _check_keys(place, found, allowed=known, needed=())
    for name, value in found.items():
        try:
            check_integer(name, value, 1)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return TextSettings(**found)


def _read_arm(
    entry: Mapping[str, Any], defaults: Mapping[str, Any], ratios: tuple[float, ...], place: str
) -> ArmSettings:
    _check_keys(place, entry, allowed=None, needed=("name",))
    place = f"{place} ({entry['name']})"
    if not isinstance(entry.get("compare", []), list):
        raise ValueError(f"{place}: compare must be a list of arms, found {shown(entry['compare'])}")
    own = {key: value for key, value in entry.items() if key not in ARM_KEYS}
    if own.get("method") == FULL:
        _check_settings(own, place)
        return ArmSettings(entry["name"], own)
    own = own if "press" in own else {**defaults, **own}
    if "press" not in own:  # what a press takes is known in kvpress's environment only
        _check_settings(own, place)
    return ArmSettings(entry["name"], own, tuple(entry.get("compare", ())), ratios)


def _check_settings(own: Mapping[str, Any], place: str) -> None:
    """The keys of an arm and of the defaults that it takes over: those of its method's configuration, no size."""
    if "method" not in own:
        raise ValueError(f"{place} has neither method nor press; its keys, defaults included: {sorted(own)}; methods: "
                         f"{sorted(METHODS)}")  # fmt: skip
    if own["method"] not in METHODS:
        raise ValueError(f"{place}: unknown method {own['method']!r}; methods: {sorted(METHODS)}")
    allowed = setting_names(own["method"]) - SIZES
    _check_keys(place, own, allowed=allowed | ARM_KEYS, needed=())
