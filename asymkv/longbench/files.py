"""Where downloaded and converted files live, and how they get there without ever being seen half-written."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from asymkv.files import sha256, sha256_file, write_atomic
from asymkv.paths import CACHE_ENV, cache_dir

__all__ = ["CACHE_ENV", "cache_dir", "exclusive", "sha256", "sha256_file", "staged_folder", "write_atomic"]


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
