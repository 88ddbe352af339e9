"""Checkpoints of a training run: written whole or not at all, and exact."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

PREFIX = "checkpoint-"
ASIDE = "aside-checkpoint-"  # of updates that a run made again, from an older checkpoint
FILE = "state.pt"
FORMAT = "asymkv-distill-1"


def rng_state() -> dict[str, Any]:
    """States of every random number generator of this process."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    # Plain lists, so that the file can be read without running code from it.
    numpy = [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()]
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts them back."""
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def write(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes ``folder/checkpoint-<step>`` under another name first; older ones but the newest ``keep`` go."""
    target, staged = folder / f"{PREFIX}{step}", folder / f".{PREFIX}{step}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    torch.save({"format": FORMAT, "step": step, **state}, staged / FILE)
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    for old in found(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def found(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, the oldest first."""
    steps = {p: p.name.removeprefix(PREFIX) for p in folder.glob(f"{PREFIX}*") if (p / FILE).is_file()}
    return sorted((p for p, step in steps.items() if step.isdigit()), key=lambda p: int(steps[p]))


def refuse_others(folder: Path) -> None:
    """Raises ValueError where a folder holds checkpoints: those of two runs cannot be told apart there."""
    known = found(folder)
    if known:
        raise ValueError(f"{folder} holds checkpoints of another run, up to {known[-1].name}; give --resume to go on "
                         "from them, or another --output_dir")


def set_aside(folder: Path, step: int) -> list[Path]:
    """Renames a folder's checkpoints behind ``step``, so that none of them passes for one of the run from there."""
    out = []
    for path in found(folder):
        number = path.name.removeprefix(PREFIX)
        if int(number) > step:
            target = folder / f"{ASIDE}{number}"
            shutil.rmtree(target, ignore_errors=True)
            out.append(path.rename(target))
    return out


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote.

    Raises:
        ValueError: for a folder that holds no checkpoint, or a file that is damaged or of another format.
    """
    file = path / FILE
    if not file.is_file():
        raise ValueError(f"{path} holds no checkpoint: {FILE} is missing")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{file}: unknown format; expected {FORMAT!r}")
    return state


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError unless a run is what the checkpoint was of: model, settings, text, processes."""
    other = {name: (saved.get(name), value) for name, value in now.items() if saved.get(name) != value}
    if other:
        raise ValueError(f"the checkpoint is of another run; (saved, now): {other}")
