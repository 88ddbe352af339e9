"""Which files that were measured of a model beforehand (head scores, stages, gates, bases) a piece of work has read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

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
    """A loader says what it has read and checked."""
    found = _reading.get()
    if found is not None:
        found[what] = sha256


def files_of(config: CompressionConfig, model: PreTrainedModel) -> dict[str, str]:
    """What a cache of these settings reads of measured files; nothing where it cannot be made, which its use will tell.

    A path in a setting, or the user's cache folder, says nothing of what lies there today.
    """
    from asymkv.cache import CompressedCache

    try:
        return CompressedCache.for_model(config, model).files
    except ValueError:
        return {}
