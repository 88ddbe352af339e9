"""Values of command lines: types for argparse whose errors name what was found and what is allowed."""

from __future__ import annotations

import argparse

# What ``--dtype`` takes; "auto" is the checkpoint's own.
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def not_negative(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, minimum: int) -> int:
    try:
        found = int(text)
    except ValueError:
        found = minimum - 1
    if found < minimum:
        raise argparse.ArgumentTypeError(f"must be an integer >= {minimum}; found {text!r}")
    return found


def names(text: str) -> list[str]:
    """Names that commas separate; blanks around them are not part of them."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"must be names separated by commas, none of them empty; found {text!r}")
    return found


def token_ids(text: str) -> list[int]:
    """Token ids that commas separate."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"must be token ids >= 0 separated by commas, such as 2,99; found {text!r}")
    return [int(part) for part in parts]
