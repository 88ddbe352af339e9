"""Text for training: from ``datasets`` or local files, as blocks of tokens in an order that a seed and a step fix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Short names of the public code.
DATASETS = {
    "wikitext-103-v1": ("Salesforce/wikitext", "wikitext-103-v1"),
    "wikitext-2-v1": ("Salesforce/wikitext", "wikitext-2-v1"),
}
SUFFIXES = (".txt", ".md", ".jsonl")


def read_files(paths: Sequence[str | Path]) -> Iterator[str]:
    """Documents of local files: a text file is one, a ``.jsonl`` file has one per line under "text".

    Raises:
        ValueError: for a file that is missing, of another kind, or a line without text.
    """
    for path in map(Path, paths):
        if path.suffix not in SUFFIXES:
            raise ValueError(f"text files must end in one of {list(SUFFIXES)}; found {path.name!r}")
        if not path.is_file():
            raise ValueError(f"no text file at {path}")
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            yield content
            continue
        for number, line in enumerate(content.splitlines(), 1):
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"{path}, line {number}: expected an object with \"text\"; found {line[:60]!r}")
            yield row["text"]


def read_dataset(name: str, split: str, cache_dir: str | None = None) -> Iterator[str]:
    """The column "text" of a split of a data set: one of ``DATASETS``, a hub id, or ``id:configuration``.

    Raises:
        ImportError: if ``datasets`` is not installed.
        ValueError: for a data set without texts.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("data sets by name need the package: pip install datasets (or give --train_file)") from None
    path, _, configuration = name.partition(":")
    path, known = DATASETS.get(name, (path, configuration or None))
    rows = load_dataset(path, known, split=split, cache_dir=cache_dir)
    if "text" not in rows.column_names:
        raise ValueError(f"data set {name!r} has no column 'text'; found {rows.column_names}")
    return iter(rows["text"])


def to_blocks(texts: Iterable[str], tokenizer: Any, length: int, most: int | None = None) -> Tensor:
    """Documents one behind the other, ended by the end-of-sequence token where there is one, cut into blocks.

    Args:
        length: tokens of a block; the rest at the end is dropped.
        most: blocks to take at most.

    Returns:
        ``[N, length]`` int64.

    Raises:
        ValueError: for less text than one block.
    """
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        if text.strip():
            ids += tokenizer(text, add_special_tokens=False)["input_ids"] + end
        if most is not None and len(ids) >= most * length:
            break
    count = min(len(ids) // length, len(ids) if most is None else most)
    if not count:
        raise ValueError(f"the text has {len(ids)} tokens, less than one block of max_length={length}")
    return torch.tensor(ids[: count * length]).view(count, length)


@dataclass(frozen=True)
class BlockOrder:
    """Which blocks a step takes: a new permutation every epoch, so that any step can be found again.

    Args:
        blocks: how many there are.
        batch: of one process at a time.
        processes: how many take their share of every step.
        seed: of the permutations.

    Raises:
        ValueError: for fewer blocks than one batch of all processes.
    """

    blocks: int
    batch: int
    processes: int
    seed: int

    def __post_init__(self) -> None:
        if self.per_epoch < 1:
            raise ValueError(f"{self.blocks} blocks of text are fewer than one batch of {self.batch} on each of "
                             f"{self.processes} processes")

    @property
    def per_epoch(self) -> int:
        """Batches of one process in an epoch; what does not fill a batch waits for another permutation."""
        return self.blocks // (self.batch * self.processes)

    def batch_of(self, number: int, process: int) -> list[int]:
        """Blocks of the ``number``-th batch since the beginning of training."""
        epoch, place = divmod(number, self.per_epoch)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        first = (place * self.processes + process) * self.batch
        return torch.randperm(self.blocks, generator=generator)[first : first + self.batch].tolist()


def digest(blocks: Tensor) -> str:
    """sha256 of blocks of tokens: training goes on only with the text that it began with."""
    return hashlib.sha256(blocks.numpy().tobytes()).hexdigest()
