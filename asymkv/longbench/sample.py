"""The standing sample: a few rows of a few tasks, named by id, on which every arm is measured.

The sample is a file of ids with a digest; the rows themselves stay where they are (``load_sample`` looks them up).
Contexts are dealt into two halves, so that nothing is tuned on what is reported (:func:`half_of`).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymkv.checks import check_integer
from asymkv.files import sha256
from asymkv.longbench import suites
from asymkv.longbench.data import Row, embedded_tasks, ids_sha256, load_rows
from asymkv.longbench.suites import Reader

STANDING_TASKS = ("needle", "trec", "qasper", "qmsum", "gov_report", "multi_news", "lcc")
MAX_PROMPT_TOKENS = 3300
ROWS_PER_TASK = 6
TUNE, REPORT = HALVES = ("tune", "report")
RUN, SHARED_LIMIT = 60, 0.02  # characters in a row; share of them from which two texts count as the same material


@dataclass(frozen=True)
class Sample:
    """Which rows are run.

    Args:
        tasks: row ids by task.
        max_prompt_tokens: longer prompts are cut in the middle; None = the model's own limit.
    """

    tasks: dict[str, list[str]]
    max_prompt_tokens: int | None

    @property
    def sha256(self) -> str:
        """Digest of the ids."""
        return sample_sha256(self.tasks)


def select_standing_sample(
    data_dir: str | Path,
    count_tokens: Callable[[str], int],
    *,
    tasks: Sequence[str] = STANDING_TASKS,
    rows_per_task: int = ROWS_PER_TASK,
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
    min_prompt_tokens: int = 0,
    half: str | None = None,
    reported: Collection[str] = (),
) -> dict[str, Any]:
    """Chooses rows by rule, so that anybody with the same files gets the same ids.

    Of the rows that share a context, the one with the longest first answer stands for it. Contexts of at most
    ``max_prompt_tokens`` tokens are spread evenly over their length, or over the planted fact's depth where rows have
    one (lengths taking turns). A task with too few of them gives all it has and its next longer ones, whose prompts
    are then cut in the middle to ``max_prompt_tokens``.

    Args:
        data_dir: folder of ``<task>.jsonl``.
        count_tokens: length of a text in tokens.
        tasks: the tasks, in the file's order.
        rows_per_task: rows of each.
        max_prompt_tokens: longest prompt when the sample is run.
        min_prompt_tokens: only contexts of at least so many tokens.
        half: only contexts of this half of the data, "tune" or "report"; None = all.
        reported: ids of rows whose contexts belong to the report half whatever the rule says.

    Returns:
        The content of a sample file: limits, ids by task, and their sha256.
    """
    chosen = {}
    for task in tasks:
        rows = load_rows(task, data_dir=data_dir)
        fixed = {row["context"] for row in rows if row["_id"] in reported}
        wanted = [row for row in rows if half in (None, half_of(row["context"], fixed))]
        sized = [(count_tokens(row["context"]), row) for row in _one_per_context(wanted)]
        sized = [pair for pair in sized if pair[0] >= min_prompt_tokens]
        sized.sort(key=lambda pair: (pair[0], pair[1]["_id"]))
        if len(sized) < rows_per_task:
            least = f" of at least {min_prompt_tokens} tokens" if min_prompt_tokens else ""
            raise ValueError(f"{task} has {len(sized)} different contexts{least}, {rows_per_task} rows are wanted")
        fitting = [pair for pair in sized if pair[0] <= max_prompt_tokens]
        pool = fitting if len(fitting) >= rows_per_task else sized[:rows_per_task]
        chosen[task] = [row["_id"] for row in _spread([row for _, row in pool], rows_per_task)]
    return {"max_prompt_tokens": max_prompt_tokens, "sha256": sample_sha256(chosen), "tasks": chosen}


def half_of(context: str, reported: Collection[str] = ()) -> str:
    """The half that a context belongs to: "report" for those that are reported already, else by its sha256."""
    return TUNE if context not in reported and int(sha256(context.encode())[:8], 16) % 2 else REPORT


def text_runs(texts: Iterable[str]) -> set[str]:
    """All runs of ``RUN`` characters of some texts, for :func:`shared_text`."""
    return {text[i : i + RUN] for text in texts for i in range(len(text) - RUN + 1)}


def shared_text(context: str, runs: Collection[str]) -> float:
    """Share of a context's runs of ``RUN`` characters that are among ``runs``, of every seventh.

    Contexts of different halves may still be made of the same material: haystacks, demonstrations, two cuts of one
    report.
    """
    starts = range(0, len(context) - RUN + 1, 7)
    return sum(context[i : i + RUN] in runs for i in starts) / max(len(starts), 1)


def _one_per_context(rows: Sequence[Row]) -> list[Row]:
    best: dict[str, Row] = {}
    answered = [row for row in rows if row["answers"] and row["answers"][0].strip()]
    for row in sorted(answered, key=lambda row: (-len(row["answers"][0]), row["_id"])):
        best.setdefault(row["context"], row)
    return list(best.values())


def _evenly(count: int, total: int) -> list[int]:
    """``count`` indices spread evenly over range(total), both ends included."""
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def _spread(rows: list[Row], count: int) -> list[Row]:
    """``count`` of rows that come sorted by length: evenly over depth where they have one, else over length."""
    by_depth: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        by_depth[row.get("depth")].append(row)
    if None in by_depth or len(by_depth) < count:
        return [rows[i] for i in _evenly(count, len(rows))]
    picked = [by_depth[sorted(by_depth)[i]] for i in _evenly(count, len(by_depth))]
    return [group[turn % len(group)] for turn, group in enumerate(picked)]


def sample_sha256(tasks: Mapping[str, Sequence[str]]) -> str:
    """Digest of the ids of all tasks, each as ``task/id``, in the file's order."""
    return ids_sha256(f"{task}/{row_id}" for task, ids in tasks.items() for row_id in ids)


def read_sample(path: str | Path) -> Sample:
    """Reads a sample file.

    Raises:
        ValueError: if the ids do not have the file's sha256.
    """
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    found = sample_sha256(table["tasks"])
    if found != table["sha256"]:
        raise ValueError(f"{Path(path).name}: the ids have sha256 {found}, the file says {table['sha256']}")
    return Sample(table["tasks"], table["max_prompt_tokens"])


def pick_sample(
    source: str | Path,
    tasks: Sequence[str] | None,
    data_dir: str | Path | None,
    *,
    options: Mapping[str, Any] | None = None,
    reader: Reader | None = None,
) -> Sample:
    """The sample of a file, or ``"all"`` rows of the named tasks at the model's own prompt limit.

    Args:
        source: a sample file, or ``"all"``.
        tasks: only these tasks of the file; required for ``"all"``.
        data_dir: folder of ``<task>.jsonl``, or None for the embedded tasks and the hub.
        options: settings of the rows, by dataset or suite.
        reader: the model's tokenizer and prompt rules, for rows generated at a length in tokens.

    Raises:
        ValueError: for a task that the file does not have.
    """
    if source == "all":
        rows = {task: _rows(task, data_dir, options, reader) for task in tasks or ()}
        return Sample({task: [row["_id"] for row in found] for task, found in rows.items()}, None)
    sample = read_sample(source)
    unknown = sorted(set(tasks or ()) - set(sample.tasks))
    if unknown:
        raise ValueError(f"{Path(source).name} has no tasks {unknown}; it has {', '.join(sample.tasks)}")
    return Sample({task: sample.tasks[task] for task in tasks or sample.tasks}, sample.max_prompt_tokens)


def _rows(
    task: str,
    data_dir: str | Path | None,
    options: Mapping[str, Any] | None,
    reader: Reader | None,
    row_ids: Sequence[str] | None = None,
) -> list[Row]:
    given = options or {}
    suites.check_options(given, embedded_tasks())
    return load_rows(task, data_dir=data_dir, row_ids=row_ids, options=suites.options_for(task, given), reader=reader)


def load_sample(
    sample: Sample,
    data_dir: str | Path | None,
    *,
    options: Mapping[str, Any] | None = None,
    reader: Reader | None = None,
) -> list[tuple[str, Row]]:
    """(task, row) of a sample, the tasks taking turns, so that a part of a run covers all of them.

    Args:
        sample: the ids.
        data_dir: folder of ``<task>.jsonl``, or None for the embedded tasks and the hub.
        options: settings of the rows, as they were for the sample.
        reader: the model's tokenizer and prompt rules.
    """
    suites.check_options(options or {}, embedded_tasks(), list(sample.tasks))
    columns = {task: _rows(task, data_dir, options, reader, row_ids=ids) for task, ids in sample.tasks.items()}
    longest = max((len(rows) for rows in columns.values()), default=0)
    return [(task, rows[i]) for i in range(longest) for task, rows in columns.items() if i < len(rows)]


def first_rows(rows: Sequence[tuple[str, Row]], count: int | None) -> list[tuple[str, Row]]:
    """The first ``count`` rows of each task, in their order; 0 = none, None = all."""
    if count is not None:
        check_integer("max_rows", count, 0)
    seen: Counter[str] = Counter()
    found = []
    for task, row in rows:
        seen[task] += 1
        if count is None or seen[task] <= count:
            found.append((task, row))
    return found
