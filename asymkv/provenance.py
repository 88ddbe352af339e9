"""Which files that were measured of a model beforehand (head scores, stages, gates, bases) a piece of work has read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from asymkv.files import sha256 as hash_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from asymkv.config import CompressionConfig

_reading: ContextVar[dict[str, str] | None] = ContextVar("asymkv_files_read", default=None)


@contextlib.contextmanager
def files_read() -> Iterator[dict[str, str]]:
    """Inside, what loaders read: ``{what: sha256 of its content}``, filled as they go."""
    found: dict[str, str] = {}
    token = _reading.set(found)
    try:
        yield found
    finally:
        _reading.reset(token)


def note(what: str, sha256: str) -> None:
    """A loader says what it has read and checked; several files that hold the same kind count in their order."""
    found = _reading.get()
    if found is not None:
        before = found.get(what)
        found[what] = sha256 if before in (None, sha256) else hash_of(f"{before} {sha256}".encode())


def files_of(config: CompressionConfig, model: PreTrainedModel) -> dict[str, str]:
    """What a cache of these settings reads of measured files; nothing where it cannot be made, which its use will tell.

    A path in a setting, or the user's cache folder, says nothing of what lies there today.
    """
    from torch import OutOfMemoryError

    from asymkv.cache import CompressedCache

    try:
        return CompressedCache.for_model(config, model).files
    except (ValueError, OSError, ImportError, OutOfMemoryError):
        return {}
