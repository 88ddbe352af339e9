"""Files that are seen whole or not at all."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], object]) -> str:
    """Has ``write`` fill a file beside ``path``, then moves it into place; a failure leaves the old file as it was.

    Returns:
        sha256 of what was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        digest = sha256_file(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # as an ordinary new file; mkstemp's are private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def write_atomic(path: Path, text: str) -> None:
    """Writes ``text`` so that a reader sees the old file or the new one, never a part."""
    replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows under a header of all their columns, in order of appearance; a column that a row lacks stays empty."""
    rows = list(rows)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def sha256(data: bytes) -> str:
    """Hex digest of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
