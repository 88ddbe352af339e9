"""Writes the generated parts of README.md: methods from the registry, their retention from committed results.

    python scripts/make_readme.py            # rewrite
    python scripts/make_readme.py --check    # fail if the file is not up to date (a test runs this)
"""

from __future__ import annotations

import argparse
import csv
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from asymkv.config import CompressionConfig
from asymkv.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PROTOCOLS = ("context", "prompt")
RATIOS = ("0.5", "0.25", "0.1")
# Rows of the table of retention: label, arms of this library, arm of kvpress.
MEASURED = (
    ("SnapKV", ("snapkv",), "kvpress_snapkv"),
    ("PyramidKV", ("pyramidkv",), "kvpress_pyramidkv"),
    ("AdaKV on SnapKV", ("adakv",), "kvpress_adakv_snapkv"),
    ("ExpectedAttention", ("expected_attention",), "kvpress_expected_attention"),
    ("AdaKV on ExpectedAttention", ("adakv_expected_attention",), "kvpress_adakv_expected_attention"),
    ("ChunkKV", ("chunkkv",), "kvpress_chunkkv"),
    ("CriticalKV", ("criticalkv",), "kvpress_criticalkv"),
    ("TOVA (here in chunks of 512)", ("tova",), "kvpress_tova"),
    ("KeyDiff (here in chunks of 512)", ("keydiff",), "kvpress_keydiff"),
    ("StreamingLLM", ("streaming_llm",), "kvpress_streaming_llm"),
    ("H2O by the mean; ObservedAttention", ("h2o_mean",), "kvpress_observed_attention"),
    ("KVzip", ("kvzip",), "kvpress_kvzip"),
    ("Gate; Echo", ("gate", "echo"), None),
    ("HeadKV; DuoAttention; Razor", ("headkv", "duo_attention", "razor"), None),
    ("H2O; DynamicKV; UNComp; Knorm", ("h2o", "dynamic_kv", "uncomp", "knorm"), None),
    ("D2O; KVMerger; value merge", ("d2o", "kvmerger", "value_merge"), None),
    ("AsymKV; adaptive heads; global threshold", ("asymkv", "asymkv_adaptive", "asymkv_global"), None),
    ("AsymKV's selection, rows dropped; adaptive heads", ("asymkv_evict", "asymkv_evict_adaptive"), None),
)


def method_table() -> str:
    """One row per registered method: name, source, own options with defaults, chunk, positions."""
    rows = ["| method | what it is | own settings | prefill chunk | positions |", "|---|---|---|---|---|"]
    for name, cls in sorted(METHODS.items()):
        config = CompressionConfig(name)
        options = ", ".join(f"`{k}={v!r}`" for k, v in config.options.to_dict().items()) or "none"
        what = (inspect.getdoc(cls) or "").splitlines()[0]
        chunk = config.chunk or "whole prompt"
        rows.append(f"| `{name}` | {cls.title}. {what} | {options} | {chunk} | {config.positions} |")
    return "\n".join(rows)


def retention_table() -> str:
    """Retention at 50 / 25 / 10 % of the rows by method, of this library and of kvpress, for the measured protocols."""
    found = {protocol: _measured(protocol) for protocol in PROTOCOLS}
    measured = {protocol: arms for protocol, arms in found.items() if arms}
    header = ["method", *(f"{who}, `{protocol}`" for protocol in measured for who in ("here", "kvpress"))]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for label, own, press in MEASURED:
        cells = [part for arms in measured.values() for part in (_cell(arms, own), _cell(arms, (press,)))]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    counts = [f"{_most(arms)} (`{protocol}`)" for protocol, arms in measured.items()]
    return "\n".join([f"Rows: {', '.join(counts)}; fewer where a cell says so.", "", *lines])


def _measured(protocol: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a protocol's ``results.csv`` by arm and ratio."""
    path = ROOT / "benchmarks" / "results" / f"methods_{protocol}" / "results.csv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {(row["arm"], row["ratio"]): row for row in csv.DictReader(file)}


def _most(arms: dict[tuple[str, str], dict[str, str]]) -> int:
    return max(int(row["rows"]) for row in arms.values())


def _cell(arms: dict[tuple[str, str], dict[str, str]], names: Sequence[str | None]) -> str:
    most, parts = _most(arms), []
    for name in names:
        rows = [arms.get((name or "", ratio), {"rows": "0"}) for ratio in RATIOS]
        counts = {int(row["rows"]) for row in rows}
        if counts != {0}:
            values = " / ".join(f"{float(row['retention']):.2f}" if int(row["rows"]) else "–" for row in rows)
            parts.append(values if counts == {most} else f"{values} ({min(counts)} rows)")
    return "; ".join(parts)


def render(text: str) -> str:
    """The README with its generated parts replaced."""
    for name, make in (("methods", method_table), ("retention", retention_table)):
        part = f"<!-- {name}: generated -->\n{make()}\n<!-- end -->"
        pattern = f"<!-- {name}: generated -->.*?<!-- end -->"
        text, found = re.subn(pattern, lambda _, part=part: part, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"README.md must hold one generated part {name!r}; found {found}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    text = README.read_text(encoding="utf-8")
    new = render(text)
    if parser.parse_args().check:
        print("up to date" if new == text else "README.md is out of date: run make readme")
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
