"""What a number was measured on: date, commit, versions, processor or GPU."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def now() -> str:
    """The time in UTC, to a second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def conditions(device: torch.device, more: Sequence[str] = ()) -> dict[str, Any]:
    """Date, commit, versions (of ``more`` packages too), device and threads; plain json types."""
    packages = {name: metadata.version(name) for name in (*PACKAGES, *more)}
    return {
        "date": now(),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **packages},
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str | None:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() or platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the checkout that this package runs from, marked where its files differ; None if installed."""
    folder = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-modified" if changed.strip() else head
