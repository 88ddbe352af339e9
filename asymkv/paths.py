"""Where the shipped settings are: inside the installed package, or ``configs/`` of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOTS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


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
