"""Lines of JSON objects, read so that whatever is wrong with one is reported with its file, line and field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_SHOWN = 60
KINDS = {str: "a string", int: "a whole number", list: "a list of strings"}


class NotFiniteError(ValueError):
    """A number that is none (NaN) or has no end; whatever is computed from it would be neither."""


def numbered_objects(data: bytes, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, object) for every line that is not blank; a place is ``file:line``.

    Args:
        data: the file's content, UTF-8.
        source: the file's name, for places.

    Raises:
        ValueError: for a line that is not UTF-8, not JSON, not an object, or holds NaN or an infinity.
    """
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            place = f"{source}:{number}"
            yield place, parse_object(line, place)


def parse_object(line: bytes, place: str) -> dict[str, Any]:
    """Reads one line; errors begin with ``place``."""
    try:
        found = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error} (a file that was cut ends in such a line)") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place} must be a JSON object, found {shown(found)}")
    check_finite(found, place)
    return found


def read_json(path: Path) -> Any:
    """The content of a json file; the error names file and line."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno} is not JSON: {error.msg}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; errors as of :func:`read_json`."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, found {shown(found)}")
    return found


def check_finite(record: Mapping[str, Any], place: str) -> None:
    """Raises :class:`NotFiniteError`, naming the fields, where a number of ``record`` is NaN or infinite."""
    bad = [f"{name}={v}" for name, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    if bad:
        raise NotFiniteError(f"{place}: every number must be finite, found {', '.join(bad)}")


def check_fields(record: Mapping[str, Any], place: str, what: str, needed: Iterable[str]) -> None:
    """Raises ValueError where a field is not there, or null.

    Args:
        record: the object.
        place: begins the error.
        what: names the object, such as "a row of trec".
        needed: names of the fields.
    """
    absent = [name for name in needed if record.get(name) is None]
    if absent:
        raise ValueError(f"{place}: {what} lacks {', '.join(absent)}; it has {', '.join(record) or 'nothing'}")


def check_kinds(record: Mapping[str, Any], place: str, kinds: Mapping[str, type]) -> None:
    """Raises ValueError where a field that is there, and not null, is of another kind; a list is one of strings."""
    for name, kind in kinds.items():
        value = record.get(name)
        good = type(value) is kind and (kind is not list or all(isinstance(entry, str) for entry in value))
        if value is not None and not good:
            raise ValueError(f"{place}: field {name!r} must be {KINDS[kind]}, found {shown(value)}")


def shown(value: Any) -> str:
    """A value's type and the beginning of its text, for an error message."""
    text = repr(value)
    return f"{type(value).__name__} {text[:MAX_SHOWN]}{'...' if len(text) > MAX_SHOWN else ''}"
