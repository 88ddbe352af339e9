"""Training data for a gate: rows of many passages with the score that KVzip gives each, one file a passage.

KVzip (arXiv 2505.23416) reads a context once more, chunk by chunk, and scores a row by the highest probability that any
replayed query gives it. That is the target; what a gate may look at is the row's own key before RoPE and its value.
"""

from __future__ import annotations

import functools
import json
import logging
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.compress import compress
from asymkv.files import replace_file, sha256, write_atomic
from asymkv.head_scores import check_model, model_of
from asymkv.longbench.data import ids_sha256, load_rows
from asymkv.longbench.sample import SHARED_LIMIT, half_of, read_sample, shared_text, text_runs
from asymkv.texts import read_text

logger = logging.getLogger(__name__)

SETTINGS_FILE = "collection.json"
# Passages below this many tokens have hardly a row besides sinks and newest ones.
MIN_TOKENS = 64


@dataclass(frozen=True)
class Recipe:
    """How rows are collected.

    Args:
        max_tokens: longer texts give a window of so many tokens, at a random place.
        min_tokens: contexts of fewer tokens are not taken.
        share: of a passage's rows that are stored.
        seed: of the windows and of the rows stored.
        half: of the data that contexts are of; None: of both.
        left_out: digest of the contexts that are left out (:func:`digest`); None: none are.
    """

    max_tokens: int = 2800
    min_tokens: int = MIN_TOKENS
    share: float = 1 / 3
    seed: int = 0
    half: str | None = None
    left_out: str | None = None

    def __post_init__(self) -> None:
        if not MIN_TOKENS <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens must be at least {MIN_TOKENS} and at most max_tokens; found min_tokens = "
                             f"{self.min_tokens}, max_tokens = {self.max_tokens}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, found {self.share}")


@dataclass(frozen=True)
class Passage:
    """A text to score.

    Args:
        kind: task or file that it comes from.
        text: as it is given to the tokenizer.
    """

    kind: str
    text: str

    @property
    def name(self) -> str:
        """Name of its file, without the ending."""
        return f"{self.kind}-{sha256(self.text.encode())[:16]}"


def task_passages(
    task: str, data_dir: Path, count: int, tokenizer: Any, recipe: Recipe, left_out: Collection[str] = ()
) -> list[Passage]:
    """Contexts of a task, at random.

    Args:
        task: its name; its rows lie in ``<task>.jsonl``.
        data_dir: folder of the rows.
        count: contexts at most.
        tokenizer: that counts their tokens.
        recipe: which half of the data (:func:`asymkv.longbench.sample.half_of`), and how long they are at least.
        left_out: contexts that are never taken, nor others that share text with them (:func:`sample_contexts`).

    Returns:
        At most ``count``; none where nothing is left to take.

    Raises:
        ValueError: for a task without rows.
    """
    rows = load_rows(task, data_dir=data_dir)
    if not rows:
        raise ValueError(f"{task}.jsonl in {data_dir} holds no rows")
    barred = frozenset(left_out)
    found = sorted({row["context"] for row in rows} - barred)
    found = [t for t in found if recipe.half in (None, half_of(t, barred)) and _is_new(t, barred)]
    found = [t for t in found if len(_encode(tokenizer, t)) >= recipe.min_tokens]
    if not found:
        logger.warning("%s: %d rows, but no context of half %s with %d tokens besides those left out", task, len(rows),
                       recipe.half, recipe.min_tokens)
    random.Random(f"{recipe.seed} {task}").shuffle(found)
    return [Passage(task, text) for text in found[:count]]


def sample_contexts(files: Iterable[Path], data_dir: Path) -> frozenset[str]:
    """Contexts of all rows of sample files, whatever their task: one task's haystack is another's report."""
    found = [(task, ids) for file in files for task, ids in read_sample(file).tasks.items()]
    return frozenset(row["context"] for task, ids in found for row in load_rows(task, data_dir=data_dir)
                     if row["_id"] in ids)  # fmt: skip


def digest(contexts: Collection[str]) -> str | None:
    """What tells sets of contexts apart; None of an empty one."""
    return ids_sha256(sorted(sha256(text.encode()) for text in contexts)) if contexts else None


@functools.lru_cache(maxsize=1)
def _runs(contexts: frozenset[str]) -> set[str]:
    return text_runs(contexts)


def _is_new(text: str, left_out: frozenset[str]) -> bool:
    """Whether a text shares less than ``SHARED_LIMIT`` of itself with contexts that are left out."""
    return shared_text(text, _runs(left_out)) < SHARED_LIMIT


def file_passages(
    path: Path, count: int, tokenizer: Any, recipe: Recipe, left_out: Collection[str] = ()
) -> list[Passage]:
    """Windows of a text file, ``recipe.max_tokens`` long, at random places; none that shares text with ``left_out``.

    Raises:
        ValueError: for a text that is shorter than a window.
    """
    ids = _encode(tokenizer, read_text(path))
    if len(ids) < recipe.max_tokens:
        raise ValueError(f"{path.name} has {len(ids)} tokens; a passage takes {recipe.max_tokens} (max_tokens)")
    draw = random.Random(f"{recipe.seed} {path.name}")
    starts = [draw.randrange(len(ids) - recipe.max_tokens + 1) for _ in range(count)]
    texts = [tokenizer.decode(ids[s : s + recipe.max_tokens]) for s in starts]
    return [Passage(path.stem, text) for text in texts if _is_new(text, frozenset(left_out))]


def take_turns(groups: Iterable[Sequence[Passage]]) -> list[Passage]:
    """All passages, the groups taking turns, so that a part of a collection covers every kind."""
    return [passage for turn in zip_longest(*groups) for passage in turn if passage is not None]


class Folder:
    """A folder of collected passages; it takes one model and one recipe only.

    Args:
        path: the folder, made if absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, model: PreTrainedModel, recipe: Recipe) -> None:
        """Says what the folder holds, at its first use, and checks it later.

        Raises:
            ValueError: for a folder of another model or recipe.
        """
        wanted, unsaid = asdict(recipe), {"min_tokens": MIN_TOKENS}  # of folders that are older than the setting
        if not (self.path / SETTINGS_FILE).is_file():
            content = {"model": model_of(model), "recipe": wanted}
            write_atomic(self.path / SETTINGS_FILE, json.dumps(content, indent=1) + "\n")
        found = {**unsaid, **self.recipe_for(model)}
        differing = {k: (found.get(k), wanted[k]) for k in wanted if found.get(k) != wanted[k]}
        if differing:
            raise ValueError(f"{self.path} was collected otherwise; take another folder: (folder, given) {differing}")

    def recipe_for(self, model: PreTrainedModel) -> dict[str, Any]:
        """The recipe of a folder that was collected with this very model.

        Raises:
            ValueError: for a folder that holds no collection, or one of another model.
        """
        settings = self.settings()
        differing = check_model(settings["model"], model_of(model))
        if differing:
            raise ValueError(f"{self.path} was collected for {settings['model'].get('name')!r}, not for "
                             f"{model.config._name_or_path!r}: (folder, given) {differing}")
        return settings["recipe"]

    def settings(self) -> dict[str, Any]:
        """Model and recipe of the folder.

        Raises:
            ValueError: for a folder that holds no collection.
        """
        file = self.path / SETTINGS_FILE
        if not file.is_file():
            raise ValueError(f"{self.path} holds no collection ({SETTINGS_FILE} is missing)")
        return json.loads(file.read_text(encoding="utf-8"))

    def file(self, passage: Passage) -> Path:
        """Where a passage is kept."""
        return self.path / f"{passage.name}.safetensors"

    def files(self) -> list[Path]:
        """All passages collected so far, by name."""
        return sorted(self.path.glob("*.safetensors"))

    def add(self, model: PreTrainedModel, tokenizer: Any, passage: Passage, recipe: Recipe) -> None:
        """Scores a passage and stores a share of its rows, unless that has been done."""
        target = self.file(passage)
        if target.is_file():
            return
        rows = score_rows(model, tokenizer, passage, recipe)
        replace_file(target, lambda path: save_file(rows, path, {"kind": passage.kind}))


def score_rows(model: PreTrainedModel, tokenizer: Any, passage: Passage, recipe: Recipe) -> dict[str, Tensor]:
    """Rows of a passage (cut to a window where it is longer) and KVzip's scores of them.

    Returns:
        ``positions [n]``, ``tokens []`` (the passage's), ``keys [L, H_kv, n, D]`` before RoPE and ``values [L, H_kv, n,
        D]``, both bf16, and ``scores [L, H_kv, n]`` fp32.

    Raises:
        ValueError: for a passage too short to learn from.
    """
    draw = random.Random(f"{recipe.seed} {passage.name}")
    ids, text = _encode(tokenizer, passage.text), passage.text
    if len(ids) < MIN_TOKENS:
        raise ValueError(f"{passage.name} has {len(ids)} tokens; at least {MIN_TOKENS} are needed")
    if len(ids) > recipe.max_tokens:
        start = draw.randrange(len(ids) - recipe.max_tokens + 1)
        text = tokenizer.decode(ids[start : start + recipe.max_tokens])
    cache = compress(model, tokenizer, text, method="kvzip", ratio=1.0, retain=True)
    tokens = int(cache.tokens_seen[0])
    kept = torch.tensor([i for i in range(tokens) if draw.random() < recipe.share], dtype=torch.int64)
    keys, values, scores = [], [], []
    for layer in cache.layers:
        view = layer.view(cache.rope, 1.0)
        keys.append(view.unrotate(view.keys)[0][:, kept].bfloat16().cpu())
        values.append(view.values[0][:, kept].bfloat16().cpu())
        scores.append(view.statistics["score"][0][:, kept].clamp(min=0).float().cpu())  # 0 = never judged
    return {"positions": kept, "tokens": torch.tensor(tokens), "keys": torch.stack(keys),
            "values": torch.stack(values), "scores": torch.stack(scores)}  # fmt: skip


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
