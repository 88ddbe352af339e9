"""Writes the generated parts of README.md (methods, their retention from committed results) and of docs/methods.md.

    python scripts/make_readme.py            # rewrite
    python scripts/make_readme.py --check    # fail if the file is not up to date (a test runs this)
"""

from __future__ import annotations

import argparse
import csv
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from asymkv.budgets import HEAD_BUDGETS, LAYER_BUDGETS
from asymkv.config import CompressionConfig
from asymkv.dimensions import DIMENSIONS
from asymkv.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
PROTOCOLS = ("context", "prompt")
RATIOS = ("0.5", "0.25", "0.1")
# Rows of the table of retention: label, arm of this library, arm of kvpress.
MEASURED = (
    ("Gate", "gate", None),
    ("Echo", "echo", None),
    ("KVzip", "kvzip", "kvpress_kvzip"),
    ("HeadKV", "headkv", None),
    ("DuoAttention", "duo_attention", None),
    ("RazorAttention", "razor", None),
    ("UNComp", "uncomp", None),
    ("TOVA (here in chunks of 512)", "tova", "kvpress_tova"),
    ("KeyDiff (here in chunks of 512)", "keydiff", "kvpress_keydiff"),
    ("H2O by the mean; ObservedAttention", "h2o_mean", "kvpress_observed_attention"),
    ("H2O", "h2o", None),
    ("AsymKV's selection, rows dropped", "asymkv_evict", None),
    ("AsymKV's selection, rows dropped, adaptive heads", "asymkv_evict_adaptive", None),
    ("AdaKV on SnapKV", "adakv", "kvpress_adakv_snapkv"),
    ("ChunkKV", "chunkkv", "kvpress_chunkkv"),
    ("CriticalKV", "criticalkv", "kvpress_criticalkv"),
    ("StreamingLLM", "streaming_llm", "kvpress_streaming_llm"),
    ("Value merge", "value_merge", None),
    ("SnapKV", "snapkv", "kvpress_snapkv"),
    ("ExpectedAttention", "expected_attention", "kvpress_expected_attention"),
    ("AsymKV", "asymkv", None),
    ("AsymKV, adaptive heads", "asymkv_adaptive", None),
    ("AsymKV, global threshold", "asymkv_global", None),
    ("D2O", "d2o", None),
    ("DynamicKV", "dynamic_kv", None),
    ("PyramidKV", "pyramidkv", "kvpress_pyramidkv"),
    ("KVMerger", "kvmerger", None),
    ("Knorm", "knorm", None),
    ("AdaKV on ExpectedAttention", "adakv_expected_attention", "kvpress_adakv_expected_attention"),
)


# Rows of the table that the results open with.
HEADLINE = (
    ("`gate` (one pass, chunks of 512)", "gate"),
    ("`echo` (every chunk of 1,024 repeated once)", "echo"),
    ("`kvzip` (the whole cache first, all of it repeated)", "kvzip"),
    ("`snapkv`", "snapkv"),
    ("`asymkv`", "asymkv"),
)


def method_table() -> str:
    """One row per registered method: name, source, what it does, when it judges a prompt's rows."""
    rows = ["| method | what it is | judges a prompt |", "|---|---|---|"]
    for name, cls in sorted(METHODS.items()):
        chunk = CompressionConfig(name).chunk
        when = f"every {chunk:,} tokens" if chunk else "once, after all of it"
        when = when if cls.compresses else "never"
        rows.append(f"| `{name}` | {cls.title}. {_summary(cls)} | {when} |")
    return "\n".join(rows)


def common_settings() -> str:
    """The settings that every method takes, with the defaults of the default method."""
    config = CompressionConfig()
    own = config.options.to_dict()
    defaults = {name: value for name, value in config.to_dict().items() if name not in own}
    return _settings_table(defaults, _arguments([CompressionConfig]))


def method_sections() -> str:
    """One section per method: its docstring, defaults that differ from the common ones, its own settings."""
    return "\n\n".join(_method_section(name, cls) for name, cls in sorted(METHODS.items()))


def _method_section(name: str, cls: type) -> str:
    config, common = CompressionConfig(name), CompressionConfig("full").to_dict()
    text = (inspect.getdoc(cls) or "").split("\nArgs:")[0].strip()
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    shared = {**config.to_dict(), "chunk_size": config.chunk or "prompt", "position_policy": config.positions}
    common |= {"chunk_size": None, "position_policy": "original", "budget": shared["budget"]}
    differs = [f"`{k}={shared[k]!r}`" for k in common if k != "method" and shared[k] != common[k]]
    own = config.options.to_dict()
    parts = [f"### `{name}`: {cls.title}", text, f"Of the common settings: {', '.join(differs)}." if differs else ""]
    parts.append(_settings_table(own, _arguments(cls.__mro__[:-1])) if own else "No settings of its own.")
    return "\n\n".join(part for part in parts if part)


def kinds_table(kinds: Mapping[str, type]) -> str:
    """What a split of the budget (or of dimensions) can be: kind, what it does, its settings."""
    rows = ["| kind | what it is | settings |", "|---|---|---|"]
    for kind, cls in kinds.items():
        arguments = _arguments([cls])
        settings = "; ".join(f"`{name}`: {meaning.rstrip('.')}" for name, meaning in arguments.items())
        rows.append(f"| `{kind}` | {_summary(cls)} | {settings} |")
    return "\n".join(rows)


def shipped_table() -> str:
    """The settings in ``configs/methods``, by the comment that each opens with."""
    rows = ["| setting | what it is |", "|---|---|"]
    for path in sorted((ROOT / "configs" / "methods").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = [line[1:].strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
        rows.append(f"| `{path.stem}` | {' '.join(comment)} |")
    return "\n".join(rows)


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0].replace("``", "`")


def _arguments(classes: Iterable[type]) -> dict[str, str]:
    """What the docstrings' ``Args`` say of each setting; the first class that names one wins."""
    found: dict[str, str] = {}
    for cls in classes:
        text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        section = re.search(r"\nArgs:\n(.*?)(?=\n\S|\Z)", text, re.DOTALL)
        entry = re.compile(r"^    (\w+): (.*?)(?=^    \w|\Z)", re.DOTALL | re.MULTILINE)
        for name, meaning in entry.findall(section[1] if section else ""):
            found.setdefault(name, " ".join(meaning.split()).replace("``", "`").replace("|", "\\|"))
    return found


def _settings_table(defaults: Mapping[str, object], meanings: Mapping[str, str]) -> str:
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    rows += [f"| `{name}` | `{default!r}` | {meanings[name]} |" for name, default in defaults.items()]
    return "\n".join(rows)


def retention_table() -> str:
    """Retention at 50 / 25 / 10 % of the rows by method, of this library and of kvpress, for the measured protocols."""
    found = {protocol: _measured(protocol) for protocol in PROTOCOLS}
    measured = {protocol: arms for protocol, arms in found.items() if arms}
    header = ["method", *(f"{who}, `{protocol}`" for protocol in measured for who in ("here", "kvpress"))]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for label, own, press in MEASURED:
        cells = [part for arms in measured.values() for part in (_cell(arms, own), _cell(arms, press))]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    counts = [f"{_most(arms)} (`{protocol}`)" for protocol, arms in measured.items()]
    return "\n".join([f"Examples: {', '.join(counts)}; fewer where a cell says so.", "", *lines])


def headline_table() -> str:
    """Retention with intervals, needles and bytes of the methods in ``HEADLINE``, protocol ``context``."""
    found = _measured("context")
    shares = [f"{float(ratio):.0%}".replace("%", " %") for ratio in RATIOS]
    header = ["method", f"{shares[0]} of the rows", *shares[1:], "needles found", "bytes of stock at 25 %"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for label, arm in HEADLINE:
        rows = [found[arm, ratio] for ratio in RATIOS]
        cells = [f"{float(r['retention']):.3f} [{float(r['low']):.3f}, {float(r['high']):.3f}]" for r in rows]
        needles = ", ".join(f"{row['needles_found']}/{row['needles']}" for row in rows)
        stored = float(found[arm, "0.25"]["share_of_stock_bytes"])
        lines.append("| " + " | ".join([label, *cells, needles, f"{100 * stored:.1f} %"]) + " |")
    return "\n".join(lines)


def _measured(protocol: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a protocol's ``results.csv`` by arm and ratio; what only a run in fp32 has, from there."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for folder in (f"methods_{protocol}", f"methods_{protocol}_float32"):
        path = ROOT / "benchmarks" / "results" / folder / "results.csv"
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    found.setdefault((row["arm"], row["ratio"]), row)
    return found


def _most(arms: dict[tuple[str, str], dict[str, str]]) -> int:
    return max(int(row["rows"]) for row in arms.values())


def _cell(arms: dict[tuple[str, str], dict[str, str]], arm: str | None) -> str:
    rows = [arms.get((arm or "", ratio), {"rows": "0"}) for ratio in RATIOS]
    counts = {int(row["rows"]) for row in rows}
    if counts == {0}:
        return ""
    values = " / ".join(f"{float(row['retention']):.2f}" if int(row["rows"]) else "–" for row in rows)
    return values if counts == {_most(arms)} else f"{values} ({min(counts)} rows)"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"methods": method_table, "headline": headline_table, "retention": retention_table},
    "docs/methods.md": {
        "common": common_settings,
        "heads": partial(kinds_table, HEAD_BUDGETS),
        "layers": partial(kinds_table, LAYER_BUDGETS),
        "dimensions": partial(kinds_table, DIMENSIONS),
        "shipped": shipped_table,
        "settings": method_sections,
    },
}


def render(page: str, text: str) -> str:
    """The page with its generated parts replaced."""
    for name, make in PAGES[page].items():
        part = f"<!-- {name}: generated -->\n{make()}\n<!-- end -->"
        pattern = f"<!-- {name}: generated -->.*?<!-- end -->"
        text, found = re.subn(pattern, lambda _, part=part: part, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{page} must hold one generated part {name!r}; found {found}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    check, stale = parser.parse_args().check, []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        new = render(page, text)
        stale += [page] if new != text else []
        if not check:
            (ROOT / page).write_text(new, encoding="utf-8")
    if check:
        print(f"out of date, run make readme: {', '.join(stale)}" if stale else "up to date")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
