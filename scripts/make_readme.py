"""Writes the generated parts of README.md: the table of methods, from the registry.

    python scripts/make_readme.py            # rewrite
    python scripts/make_readme.py --check    # fail if the file is not up to date (a test runs this)
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

from asymkv.config import CompressionConfig
from asymkv.methods import METHODS

README = Path(__file__).resolve().parent.parent / "README.md"


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


def render(text: str) -> str:
    """The README with its generated part replaced."""
    part = f"<!-- methods: generated -->\n{method_table()}\n<!-- end -->"
    new, found = re.subn(r"<!-- methods: generated -->.*?<!-- end -->", lambda _: part, text, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"README.md must hold one generated part; found {found}")
    return new


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
