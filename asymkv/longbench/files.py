"""Where downloaded and converted files live, and how they get there without ever being seen half-written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

CACHE_ENV = "ASYMKV_CACHE"


def cache_dir() -> Path:
    """Returns ``$ASYMKV_CACHE``, else ``$XDG_CACHE_HOME/asymkv``, else ``~/.cache/asymkv`` (created if absent)."""
    explicit = os.environ.get(CACHE_ENV)
    base = Path(explicit) if explicit else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asymkv"
    base.mkdir(parents=True, exist_ok=True)
    return base


def sha256(data: bytes) -> str:
    """Hex digest of ``data``."""
    return hashlib.sha256(data).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Writes ``text`` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, path)


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Holds the machine-wide lock ``name``: of several ranks, one does the work and the others wait for it."""
    from filelock import FileLock

    with FileLock(cache_dir() / f"{name}.lock"):
        yield


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``target`` in one rename if the block succeeds, and vanishes if not."""
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    staging.chmod(0o755)
    try:
        yield staging
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
