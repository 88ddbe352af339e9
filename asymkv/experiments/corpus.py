"""Texts for perplexity and articles for summaries: local files, the ``datasets`` library, or what Python carries."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymkv.longbench.files import sha256

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
        name: a text file, a folder of ``.txt`` files, "embedded" (the language reference that Python carries), or a
            dataset: ``wikitext/wikitext-103-v1`` or ``wikitext`` with ``config``; its test split is read.
        config: of the dataset.
        cache_dir: of the ``datasets`` library.

    Raises:
        ValueError: for a name that is none of these, or a dataset that cannot be had.
    """
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.is_dir():
        texts = [file.read_text(encoding="utf-8") for file in sorted(path.glob("*.txt"))]
        if not texts:
            raise ValueError(f"no .txt files in {name}")
        return "\n\n".join(texts)
    if name == EMBEDDED:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    rows = _dataset(name, config, cache_dir)
    if "text" not in rows.column_names:
        raise ValueError(f"dataset {name!r} has no column 'text'; found {rows.column_names}")
    return "".join(rows["text"])


def _dataset(name: str, config: str | None, cache_dir: str | None, split: str = "test") -> Any:
    """The test split of a dataset of the hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{name!r} is no file, no folder and not {EMBEDDED!r}; as a dataset it needs the datasets "
                         "package: pip install 'asymkv[eval]'") from None
    if config is None and "/" in name:
        name, config = name.rsplit("/", 1)
    elif config is None and name.startswith("wikitext-"):
        name, config = "wikitext", name
    try:
        return load_dataset(name, config, split=split, cache_dir=cache_dir)
    except Exception as error:  # whatever hub, network or files raise
        raise ValueError(f"{name!r} ({config}) is no file or folder, and cannot be had as a dataset: "
                         f"{type(error).__name__}: {error}") from error


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
    """The first articles of a jsonl file or a dataset (``cnn_dailymail`` is its version 3.0.0).

    Raises:
        ValueError: for rows without an article and a summary.
    """
    if Path(name).is_file():
        lines = Path(name).read_text(encoding="utf-8").splitlines()[:count]
        rows: Sequence[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    else:
        config = "3.0.0" if name == "cnn_dailymail" else None
        rows = list(_dataset(name, config, cache_dir, f"test[:{count}]"))
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
