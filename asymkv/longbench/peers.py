"""kvpress in an environment of its own, and the worker process that measures its presses there.

kvpress wants transformers < 5.3, so it cannot share an environment with this library's newer one. It gets an overlay: a
folder with kvpress, its transformers and what these need, put in front of the caller's packages (torch and all else are
shared). A script that meets a press starts itself again under the overlay, with the same arguments and one flag; this
worker measures the presses into the folder of the caller, in record files of its own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import asymkv
from asymkv.longbench import files
from asymkv.longbench.arms import FULL
from asymkv.longbench.data import Row, Task
from asymkv.longbench.measure import Protocol, Record, Subject, measure
from asymkv.longbench.press_arms import PressArm, PressError, PressSpec

ENV = "ASYMKV_KVPRESS"
CALLER = "ASYMKV_KVPRESS_CALLER"
WORKER = "kvpress"
WORKER_FLAG = "--kvpress-worker"
KVPRESS = "kvpress==0.5.5"
# All of kvpress and of its transformers that imports need and that this library's own requirements do not bring.
PINS = (
    KVPRESS, "transformers==5.2.0", "tokenizers==0.22.2", "huggingface_hub==1.33.0", "httpx==0.28.1",
    "httpcore==1.0.9", "h11==0.16.0", "anyio==4.16.0", "certifi", "idna", "cachetools==8.0.1", "fire==0.7.1",
    "termcolor==3.3.0",
)  # fmt: skip
PACKAGES = ("kvpress", "transformers", "tokenizers")
# By whether the dtype has more than two bytes: between two versions of transformers, relative to a loss above 1.
FULL_TOLERANCE = {True: 1e-3, False: 0.02}

logger = logging.getLogger(__name__)


def overlay_path() -> Path:
    """Where the overlay is or will be: ``ASYMKV_KVPRESS``, or a folder of the cache that changes with the pins."""
    name = f"{KVPRESS.replace('==', '-')}-{files.sha256(' '.join(PINS).encode())[:8]}"
    return Path(os.environ[ENV]) if os.environ.get(ENV) else files.cache_dir() / name


def overlay() -> Path:
    """The overlay, installed by pip on first use.

    Raises:
        PressError: where there is none and none can be installed; says what to do.
    """
    target = overlay_path()
    if os.environ.get(ENV):
        if not (target / "kvpress").is_dir():
            raise PressError(f"{ENV} is {target}, which holds no kvpress; install it there: {_install(target)}")
        return target
    with files.exclusive(target.name):
        if not target.is_dir():
            logger.info("installing %s and its transformers in %s (once)", KVPRESS, target)
            with files.staged_folder(target) as staging:
                _pip_install(staging, target)
    return target


def _install(target: Path) -> str:
    return f"pip install --no-deps --target {target} {' '.join(PINS)}"


def _pip_install(staging: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(staging), *PINS]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise PressError(
            f"{KVPRESS} could not be installed ({why}). Where there is a network, run make kvpress or "
            f"{_install(target)}, and set {ENV} to that folder"
        )


def environment() -> dict[str, str]:
    """Environment variables of a process in the overlay, which imports this very asymkv."""
    root = Path(asymkv.__file__).resolve().parent.parent
    paths = [str(overlay()), str(root), os.environ.get("PYTHONPATH", "")]
    extra = {"PYTHONPATH": os.pathsep.join(path for path in paths if path), CALLER: str(os.getpid())}
    return {**os.environ, **extra}


def versions() -> dict[str, str]:
    """Of kvpress and what it runs on, in the overlay."""
    return {name: metadata.version(name) for name in PACKAGES}


def check(specs: Sequence[PressSpec]) -> None:
    """Builds presses in the overlay, so that a wrong name or argument is found before anything is measured.

    Raises:
        PressError: with a line for each that cannot be built, and what there is instead.
    """
    command = [sys.executable, "-m", "asymkv.longbench.peers"]
    wrong = _ask(command, json.dumps([spec.to_mapping() for spec in specs]))
    if wrong:
        raise PressError("\n".join(dict.fromkeys(wrong)))


def start_worker(script: str | Path, argv: Sequence[str]) -> dict[str, str]:
    """Runs a script again in the overlay, as the worker, and waits for it; its progress goes to this stderr.

    Args:
        script: path of the running script.
        argv: its arguments, without its name.

    Returns:
        Arms that the worker refused, and why.

    Raises:
        PressError: where the worker fails, with its message.
    """
    return _ask([sys.executable, str(script), *argv, WORKER_FLAG])


def _ask(command: Sequence[str], question: str = "") -> Any:
    """What a process in the overlay answers; the process ends with this one."""
    done = subprocess.run(command, env=environment(), input=question, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    try:
        said = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        said = {}
    if done.returncode or "answer" not in said:
        why = said.get("error", f"it ended with exit code {done.returncode} and left no message")
        raise PressError(f"kvpress's worker failed: {why}")
    return said["answer"]


def answer(work: Callable[[], Any]) -> None:
    """Runs a worker's work and says on stdout how it went, as the caller expects; exits with 1 where it failed."""
    try:
        said = {"answer": work()}
    except Exception as error:
        traceback.print_exc()
        said = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    if "error" in said:
        raise SystemExit(1)


def stop_if_orphaned() -> None:
    """Ends a worker whose caller was killed, so that a second run does not measure beside it."""
    if os.environ.get(CALLER) not in (None, str(os.getppid())):
        raise SystemExit("the process that started this worker has ended")


def compare_full(subject: Subject, task: Task, row: Row, protocol: Protocol, expected: float) -> Record:
    """Whether this environment and its caller's measure the same thing: the full cache's loss on one row.

    Args:
        subject: the model, in this environment.
        task: of the row.
        row: the row.
        protocol: as the caller measured.
        expected: the caller's loss.

    Returns:
        Both losses.

    Raises:
        PressError: where they differ by more than the dtype explains.
    """
    full = PressArm(FULL)
    with full.applied(subject.model):
        found = measure(subject, full, task, row, dataclasses.replace(protocol, generate=False))["nll"]
    allowed = FULL_TOLERANCE[subject.model.dtype.itemsize > 2]
    if abs(found - expected) > allowed * max(1, abs(expected)):
        raise PressError(
            f"the full cache loses {found} on row {row['_id']} here, and {expected} outside this worker; a folder that "
            "was begun on another processor is not gone on with in half precision, take another --out"
        )
    return {"dataset": task.dataset, "id": row["_id"], "expected": expected, "found": found}


def _build_all() -> list[str]:
    from asymkv.longbench import presses

    wrong = []
    for table in json.loads(sys.stdin.read()):
        try:
            presses.build(PressSpec.from_mapping(table))
        except PressError as error:
            wrong.append(str(error))
    return wrong


def main() -> None:
    """``--install`` prints the overlay's folder; without it, builds the presses of stdin, in the overlay."""
    if "--install" in sys.argv[1:]:
        logging.basicConfig(level=logging.INFO)
        sys.stdout.write(f"{overlay()}\n")
    else:
        answer(_build_all)


if __name__ == "__main__":
    main()
