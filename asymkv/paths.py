"""Where files are: shipped settings (in the package, or ``configs/`` of a checkout), and the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOTS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
CACHE_ENV = "ASYMKV_CACHE"


def cache_dir() -> Path:
    """Returns ``$ASYMKV_CACHE``, else ``$XDG_CACHE_HOME/asymkv``, else ``~/.cache/asymkv`` (created if absent)."""
    explicit = os.environ.get(CACHE_ENV)
    base = Path(explicit) if explicit else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asymkv"
    base.mkdir(parents=True, exist_ok=True)
    return base


def config_root() -> Path:
    """The folder of shipped settings.

    Raises:
        FileNotFoundError: if the installation carries none.
    """
    for root in _ROOTS:
        if root.is_dir():
            return root
    raise FileNotFoundError(f"no settings folder in {[str(r) for r in _ROOTS]}")


def config_path(relative: str) -> Path:
    """Path of a shipped settings file.

    Raises:
        FileNotFoundError: if there is none; lists what the folder holds.
    """
    path = config_root() / relative
    if not path.exists():
        there = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"no settings file {relative!r}; {path.parent.name}/ holds {there}")
    return path
