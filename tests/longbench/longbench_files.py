"""What several of these tests write and load."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from asymkv.longbench.measure import Protocol

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load_script(name: str) -> ModuleType:
    """Imports a script by its file name."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOCK = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


def other_process(path: Path) -> subprocess.Popen:
    """Locks a file as a rank does, and holds it until it is killed."""
    command = [sys.executable, "-c", LOCK, str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


TASK, ROWS, METHODS = "qasper", 8, ("full", "streaming_llm")
PROTOCOL = Protocol("context", max_new_tokens=12)


def write_inputs(folder: Path, task: str = TASK, rows: int = ROWS) -> Path:
    """A data folder with one task, and LongBench-like prompts beside it."""
    table = [
        {"input": f"{i}?", "context": f"{i} " * 60, "answers": [f"a{i}"], "length": 3990 + 4 * i, "_id": f"row{i}"}
        for i in range(rows)
    ]
    write_rows(folder / f"{task}.jsonl", table)
    base = task.removesuffix("_e")
    (folder / "dataset2prompt.json").write_text(json.dumps({base: "{context}\n{input}"}), encoding="utf-8")
    (folder / "dataset2maxlen.json").write_text(json.dumps({base: 24}), encoding="utf-8")
    return folder


def pred_arguments(inputs: Path, model: Path, out: Path, *more: str, task: str = TASK) -> list[str]:
    """The command line of scripts/pred.py for these inputs."""
    command = ["--model", str(model), "--max-length", "500", "--dtype", "float32", "--device", "cpu", "--threads", "1"]
    command += ["--data-dir", str(inputs), "--datasets", task, "--longbench-config", str(inputs), "--out", str(out)]
    command += ["--method", ",".join(METHODS), "--ratio", "0.5", "--set", "sink_size=2", "--set", "window_size=8"]
    command += ["--changed-prompts"]
    return [*command, "--protocol", PROTOCOL.name, "--max-new-tokens", str(PROTOCOL.max_new_tokens), *more]


def stored_lines(out: Path) -> list[str]:
    """Lines of all files of records below ``out``."""
    return [line for path in out.glob("*/records-*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]


def merged_but_for_times(out: Path) -> dict[str, str]:
    """The merged files of all arms with time and memory set to 0."""
    measured = re.compile(r'"(\w+_seconds|peak_rss_\w+)": [-+.e\d]+')
    paths = sorted(path for path in out.glob("*/*.jsonl") if not path.name.startswith("records-"))
    return {f"{p.parent.name}/{p.name}": measured.sub(r'"\1": 0', p.read_text(encoding="utf-8")) for p in paths}
