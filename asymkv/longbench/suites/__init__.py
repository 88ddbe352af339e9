"""Benchmarks beside LongBench that the same runner asks and scores: one file each, one line each in ``SUITES``.

A suite gives its datasets; a dataset gives its prompt, its rows (from a local folder, from the hub, or generated) and
the score of one prediction. ``scripts/pred.py --datasets NAME`` takes a suite's name for all its datasets, or a
dataset's name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

from asymkv.longbench.suites import gsm8k, longbench_v2, ruler, scbench, squad, topics
from asymkv.longbench.suites.base import Benchmark, Reader, Source, Suite

__all__ = [
    "SUITES", "Benchmark", "Reader", "Source", "Suite", "check_options", "find", "groups", "names", "options_for",
    "parse_options",
]  # fmt: skip

SUITES: tuple[Suite, ...] = (
    ruler.SUITE,
    longbench_v2.SUITE,
    squad.SUITE,
    gsm8k.SUITE,
    topics.SUITE,
    scbench.SUITE,
)


@cache
def _by_name() -> dict[str, tuple[Suite, Benchmark]]:
    return {benchmark.name: (suite, benchmark) for suite in SUITES for benchmark in suite.benchmarks}


def find(dataset: str) -> Benchmark | None:
    """The dataset of that name; None where no suite has it (LongBench's and the embedded tasks)."""
    entry = _by_name().get(dataset)
    return None if entry is None else entry[1]


def names() -> list[str]:
    """All datasets of all suites."""
    return list(_by_name())


def groups() -> dict[str, tuple[str, ...]]:
    """What each suite's name stands for: those of its datasets that need nothing but their own data."""
    return {suite.name: suite.group for suite in SUITES}


def check_options(
    options: Mapping[str, Any], others: Iterable[str] = (), asked: Collection[str] | None = None
) -> None:
    """Checks the shape and the names of what ``--options`` gave; each dataset checks its own settings.

    Args:
        options: settings by dataset, or by suite for those of its datasets that take them.
        others: further datasets that have settings (the embedded tasks).
        asked: the datasets that are run; None: not told.

    Raises:
        ValueError: for a name that is neither a suite nor a dataset with settings, settings that are no object, a
            setting that no dataset of the suite has, or settings of what is not run; each lists what is allowed.
    """
    suites = {suite.name: suite for suite in SUITES}
    known = list(dict.fromkeys([*suites, *names(), *others]))
    for name, settings in options.items():
        if name not in known:
            raise ValueError(f"options for {name!r}, which has none; known: {', '.join(known)}")
        if not isinstance(settings, Mapping):
            raise ValueError(f"options of {name} must be an object of settings, found {settings!r}")
        members = {name, *(benchmark.name for benchmark in suites[name].benchmarks)} if name in suites else {name}
        if asked is not None and not members & set(asked):
            raise ValueError(f"options of {name}, which is not run; the datasets are {', '.join(asked)}")
        if name in suites and find(name) is None:
            allowed = list(dict.fromkeys(key for benchmark in suites[name].benchmarks for key in benchmark.options))
            unknown = sorted(set(settings) - set(allowed))
            if unknown:
                raise ValueError(f"{name} has no options {unknown}; allowed: {', '.join(allowed) or 'none'}")


def parse_options(text: str) -> dict[str, Any]:
    """The value of ``--options``; for argparse's ``type``."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}: {text!r}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be an object of settings by dataset or suite, found {text!r}")
    return found


def options_for(dataset: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one dataset: those of its suite that it takes, and its own over them."""
    entry = _by_name().get(dataset)
    if entry is None:
        return dict(options.get(dataset, {}))
    suite, benchmark = entry
    shared = {} if suite.name == dataset else options.get(suite.name, {})
    return {key: value for key, value in shared.items() if key in benchmark.options} | dict(options.get(dataset, {}))
