"""Texts for perplexity and articles for summaries: local files, the ``datasets`` library, or what Python carries."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymkv.longbench.files import sha256
from asymkv.longbench.jsonl import numbered_objects
from asymkv.texts import load_split, read_files, text_column

EMBEDDED = "embedded"
# Names of an article and its summary in common datasets, and in LongBench's rows.
ARTICLE_FIELDS, SUMMARY_FIELDS = ("article", "document", "context", "text"), ("highlights", "summary", "answers")


@dataclasses.dataclass(frozen=True)
class Article:
    """A text and its reference summary."""

    text: str
    summary: str


def read_text(name: str, *, config: str | None = None, cache_dir: str | None = None) -> str:
    """One long text.

    Args:
        name: a text file, a ``.jsonl`` file with a document per line under "text", a folder of either, "embedded" (the
            language reference that Python carries), or a data set as in :func:`asymkv.texts.split_name`, whose test
            split is read.
        config: of the data set.
        cache_dir: of the ``datasets`` library.

    Raises:
        ImportError: for a data set, if ``datasets`` is not installed.
        ValueError: for a name that is none of these, or a data set that cannot be had.
    """
    path = Path(name)
    if path.is_file():
        # Whatever it is called, a file is text; only documents in lines have to be taken apart.
        return "\n\n".join(read_files([path])) if path.suffix == ".jsonl" else path.read_text(encoding="utf-8")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".jsonl"))
        if not files:
            raise ValueError(f"no .txt or .jsonl files in {name}")
        return "\n\n".join(read_files(files))
    if name == EMBEDDED:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    rows = load_split(name, "test", configuration=config, cache_dir=cache_dir)
    return "".join(text_column(rows, name))


def windows(ids: Tensor, length: int, count: int) -> list[Tensor]:
    """``count`` windows of ``length`` tokens, evenly spread over ``ids [n]``, overlapping where they must.

    Raises:
        ValueError: for a text shorter than a window.
    """
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens; a window of {length} needs a longer one")
    count = min(count, len(ids) - length + 1)
    starts = torch.linspace(0, len(ids) - length, count).long().unique().tolist()
    return [ids[s : s + length] for s in starts]


def read_articles(name: str, count: int, *, cache_dir: str | None = None) -> list[Article]:
    """The first articles of a jsonl file or a data set (``cnn_dailymail`` is its version 3.0.0).

    Raises:
        ValueError: for rows without an article and a summary.
    """
    if Path(name).is_file():
        found = numbered_objects(Path(name).read_bytes(), name)
        rows: Sequence[dict[str, Any]] = [row for _, row in itertools.islice(found, count)]
    else:
        rows = list(load_split(name, f"test[:{count}]", cache_dir=cache_dir))
    return [_article(row, name) for row in rows]


def _article(row: dict[str, Any], name: str) -> Article:
    text = next((row[f] for f in ARTICLE_FIELDS if f in row), None)
    summary = next((row[f] for f in SUMMARY_FIELDS if f in row), None)
    if text is None or not summary:
        raise ValueError(f"{name}: a row needs one of {ARTICLE_FIELDS} and one of {SUMMARY_FIELDS}; found "
                         f"{sorted(row)}")
    return Article(text, summary[0] if isinstance(summary, list) else summary)


def digest(ids: Tensor) -> str:
    """Of token ids, for the record of what was read."""
    return sha256(json.dumps(ids.tolist()).encode())
