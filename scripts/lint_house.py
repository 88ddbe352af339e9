"""House rules that ruff does not check: sizes of functions and files, English text, no leftovers.

    python scripts/lint_house.py
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("asymkv", "scripts", "tests", "csrc")
MAX_FILE, MAX_FUNCTION = 400, 60
# Ideographs and kana; metrics and data for Chinese tasks are the place for them.
CJK = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
CJK_ALLOWED = ("longbench",)
LEFTOVER = re.compile(r"\b(FIXME|XXX|HACK)\b|NotImplementedError|#\s*(if|for|return|import|print)\b.*[:(]\s*$")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def check(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    name = path.relative_to(ROOT)
    if len(lines) > MAX_FILE:
        yield f"{name}: {len(lines)} lines, at most {MAX_FILE}"
    for number, line in enumerate(lines, 1):
        if CJK.search(line) and not any(part in str(name) for part in CJK_ALLOWED):
            yield f"{name}:{number}: text must be English"
        if LEFTOVER.search(line) and path.name != Path(__file__).name:
            yield f"{name}:{number}: leftover: {line.strip()}"
    if path.suffix == ".py":
        tree = ast.parse(text)
        yield from (
            f"{name}:{f.lineno}: {f.name} has {body_lines(f)} lines, at most {MAX_FUNCTION}"
            for f in functions(tree)
            if body_lines(f) > MAX_FUNCTION
        )
        if name.parts[0] == "asymkv":
            yield from untyped(tree, str(name))


def untyped(tree: ast.AST, name: str) -> Iterator[str]:
    """Public functions with an argument or a result that has no type."""
    for f in functions(tree):
        args = [a for a in [*f.args.args, *f.args.kwonlyargs] if a.arg not in ("self", "cls")]
        missing = [a.arg for a in args if a.annotation is None]
        if not f.name.startswith("_") and missing:
            yield f"{name}:{f.lineno}: {f.name}: no type for {missing}"


def main() -> int:
    files = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.suffix in (".py", ".cpp", ".cu")]
    found = [problem for path in files for problem in check(path)]
    print("\n".join(found) or f"house rules hold in {len(files)} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
