"""Text for training: from ``datasets`` or local files, as blocks of tokens in an order that a seed and a step fix."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asymkv.texts import documents, load_split, text_column


def read_dataset(name: str, split: str, cache_dir: str | None = None) -> Iterator[str]:
    """Documents of a split of a data set, its column "text"; its name as in :func:`asymkv.texts.split_name`.

    Raises:
        ImportError: if ``datasets`` is not installed.
        ValueError: for a data set that cannot be had, or without texts.
    """
    return documents(text_column(load_split(name, split, cache_dir=cache_dir), name), name)


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
