"""Runs many arms over the same rows and texts, and records what each stores and what it loses.

An arm is a named configuration; a cell is an arm at one ratio. Rows give the loss of the gold answer (and, where a
fact was planted, whether it is found again), texts give loss and KL divergence of a continuation. Work goes row by
row, all cells of a row in turn, so that an unfinished run compares its arms on the same rows.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from asymkv import CompressionConfig
from asymkv.longbench import files, models, peers
from asymkv.longbench.arms import FULL, NONE, Arm, ArmError, BaseArm, named_refusal
from asymkv.longbench.data import Row, Task
from asymkv.longbench.fidelity_experiment import Cell, Experiment, TextSettings
from asymkv.longbench.jsonl import NotFiniteError
from asymkv.longbench.measure import Protocol, Subject, measure, prompt_of
from asymkv.longbench.press_arms import PressArm
from asymkv.longbench.records import Record, RecordFolder
from asymkv.longbench.retention import (
    Prefix,
    compress,
    contains_answer,
    continuation_logits,
    continuation_score,
    split_prompt,
    text_windows,
)
from asymkv.longbench.sample import Sample
from asymkv.longbench.shared_prefill import prefill_together, share_groups
from asymkv.texts import read_text

KEY_FIELDS = ("kind", "dataset", "id", "arm", "ratio")
# Of a row's record; what could repeat the row's text stays out.
ROW_FIELDS = (
    "nll", "gold_tokens", "prompt_tokens", "question_tokens", "removed_tokens", "depth", "target_len", "target_unit",
    "tokens_seen", "rows_min", "rows_max", "kept_ratio", "nominal_ratio", "stored_bytes", "full_bytes",
    "peak_rows", "peak_bytes", "compactions", "backend", "prefill_seconds",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Window:
    """A piece of a long text: tokens that are compressed, and the tokens after them that are scored."""

    text: str
    index: int
    prefix: list[int]
    targets: list[int]


def record_key(record: Record) -> tuple[Any, ...]:
    """Identity of a record: what was measured, on which row or window, by which cell."""
    return tuple(record[name] for name in KEY_FIELDS)


def _key(kind: str, dataset: str, item: str, arm: Cell) -> tuple[Any, ...]:
    return (kind, dataset, item, arm.name, arm.ratio)


def without_context() -> Arm:
    """The arm that never reads the context: the zero of context retention."""
    return Arm(NONE, CompressionConfig(method=FULL), bare=True)


class FidelityRun:
    """Measures cells on one model and appends what it finds to a folder.

    An arm that stores more than its settings allow, refuses a prompt, fails, or gives NaN is not recorded and not run
    again; ``refused`` says why, by arm, so that the others of a long run are still measured.

    Args:
        subject: an unpatched model, and how it is prompted.
        protocol: what is in view while the cache is compressed, see ``asymkv.longbench.retention``.
        folder: where records go; what it already has is not measured again.
        share: one prefill for all cells that can share it; their ``prefill_seconds`` are None.
        session: name of the run that measures, written beside each record; times of different ones do not compare.
    """

    def __init__(
        self, subject: Subject, protocol: str, folder: RecordFolder, *, share: bool = False, session: str | None = None
    ) -> None:
        self.subject = subject
        self.share = share
        self.session = {} if session is None else {"session": session}
        self.protocol = protocol
        self.folder = folder
        self.done = folder.done()
        self.refused: dict[str, str] = {}

    def missing(self, kind: str, dataset: str, item: str, cells: Sequence[Cell]) -> list[Cell]:
        """Cells without a record of this row or window, those of refused arms left out."""
        cells = [cell for cell in cells if cell.name not in self.refused]
        return [cell for cell in cells if _key(kind, dataset, item, cell) not in self.done]

    def _save(self, kind: str, dataset: str, item: str, cell: Cell, values: Record) -> None:
        key = _key(kind, dataset, item, cell)
        self.folder.append({**dict(zip(KEY_FIELDS, key, strict=True)), **values, **self.session})
        self.done.add(key)

    @contextmanager
    def _patched(self, cell: BaseArm) -> Iterator[None]:
        """The model under a cell's configuration; takes note of the cell's refusal."""
        with cell.applied(self.subject.model):
            try:
                yield
            except (ArmError, NotFiniteError) as error:
                self.refused[cell.name] = str(error)
                logger.error("%s is not measured: %s", cell.name, error)

    def run_row(self, task: Task, row: Row, cells: Sequence[Cell]) -> Iterator[str]:
        """Measures what is missing of one row; yields each cell's name before its turn.

        The gold answer is cut to the task's answer length. A row with a planted fact (``depth``) is also answered.
        """
        protocol = Protocol(self.protocol, generate="depth" in row, max_gold_tokens=task.max_new_tokens)
        missing = self.missing("row", task.dataset, row["_id"], cells)
        first = [] if "turns" in row else self._first_ids(task, row)
        for cell, prefix in self._prefixes(missing, first):
            yield cell.name
            with self._patched(cell):
                record = measure(self.subject, cell, task, row, protocol, prefix)
                values = {name: record[name] for name in ROW_FIELDS if name in record}
                if protocol.generate:
                    values["found"] = contains_answer(record["pred"], row["answers"])
                self._save("row", task.dataset, row["_id"], cell, values)

    def _first_ids(self, task: Task, row: Row) -> list[int]:
        """The tokens that are in view while a row is compressed."""
        return split_prompt(prompt_of(self.subject, Arm(FULL, CompressionConfig(FULL)), task, row), self.protocol)[0]

    def _prefixes(self, cells: Sequence[Cell], ids: Sequence[int]) -> Iterator[tuple[Cell, Prefix | None]]:
        """The cells that still run, with their prefix of ``ids`` where a prefill was shared."""
        for group in share_groups(cells, len(ids)) if self.share and ids else ([cell] for cell in cells):
            group = [cell for cell in group if cell.name not in self.refused]
            alone: list[Prefix | None] = [None] * len(group)
            shared = prefill_together(self.subject, group, ids) if len(group) > 1 else alone
            for cell in group:
                prefix = shared.pop(0)  # let go of once measured
                if cell.name not in self.refused:
                    yield cell, prefix

    def run_window(self, window: Window, cells: Sequence[Cell]) -> Iterator[str]:
        """Measures what is missing of one window against the full cache; yields as ``run_row`` does."""
        cells = [cell for cell in cells if not cell.bare]
        missing = self.missing("window", window.text, str(window.index), cells)
        full = [cell for cell in cells if not cell.compresses]
        reference: Tensor | None = None
        cells = [*full, *(cell for cell in missing if cell not in full)] if missing else []
        for cell, prefix in self._prefixes(cells, window.prefix):
            if reference is None and cell.compresses:
                return  # the full cache was refused: nothing to compare with
            yield cell.name
            with self._patched(cell):
                logits, values = self._continue(cell, window, prefix)
                reference = logits if reference is None else reference
                if cell in missing:
                    values |= dataclasses.asdict(continuation_score(logits, reference, window.targets))
                    self._save("window", window.text, str(window.index), cell, values)

    def _continue(self, cell: BaseArm, window: Window, shared: Prefix | None) -> tuple[Tensor, Record]:
        """Logits of a window's targets behind its compressed prefix, and what that stores."""
        started = time.perf_counter()
        with named_refusal(cell, window.text, str(window.index)):
            prefix = shared or compress(self.subject.model, window.prefix)
        seconds = None if shared else time.perf_counter() - started
        cell.check(prefix.cache, len(window.prefix), 0)
        values = {"prefill_seconds": seconds, **cell.stored(prefix.cache, self.subject.model)}
        return continuation_logits(self.subject.model, prefix, window.targets, len(window.targets)), values

    def compare_full(self, name: str, tasks: Mapping[str, Task], rows: Sequence[tuple[str, Row]]) -> Record | None:
        """Compares the full cache here with its first record, see :func:`asymkv.longbench.peers.compare_full`.

        Args:
            name: of the full cache's arm.
            tasks: prompts by dataset.
            rows: the first one with a record is measured again.

        Returns:
            Both losses, or None where there is no record.
        """
        losses = {record_key(record): record["nll"] for record in self.folder.read() if record["kind"] == "row"}
        for dataset, row in rows:
            expected = losses.get(("row", dataset, row["_id"], name, None))
            if expected is not None:
                protocol = Protocol(self.protocol, max_gold_tokens=tasks[dataset].max_new_tokens)
                return peers.compare_full(self.subject, tasks[dataset], row, protocol, expected)
        return None


def read_texts(folder: str | Path) -> dict[str, str]:
    """Plain texts of a folder by file name without ``.txt``."""
    found = {path.stem: read_text(path) for path in sorted(Path(folder).glob("*.txt"))}
    if not found:
        raise FileNotFoundError(f"no .txt files in {folder}")
    return found


def windows_of(texts: Mapping[str, str], tokenizer: Any, settings: TextSettings) -> list[Window]:
    """Windows of all texts, the texts taking turns; a text too short for one is named in the log."""
    columns = {}
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        columns[name] = text_windows(ids, settings.prefix_tokens, settings.target_tokens, settings.windows)
        if not columns[name]:
            logger.warning("text %s has only %d tokens and gives no window", name, len(ids))
    turns = range(settings.windows)
    return [Window(name, i, *found[i]) for i in turns for name, found in columns.items() if i < len(found)]


def texts_sha256(texts: Mapping[str, str]) -> dict[str, str]:
    """Digest of each text's content."""
    return {name: files.sha256(text.encode("utf-8")) for name, text in texts.items()}


def run_settings(
    experiment: Experiment,
    cells: Sequence[Cell],
    subject: Subject,
    protocol: str,
    *,
    sample: Sample,
    contents: str | None,
    tasks: Mapping[str, Task],
    texts: Mapping[str, str] | None,
) -> Record:
    """Everything that the numbers depend on, for ``RecordFolder.claim``; ``contents``: digest of the sample's rows."""
    arms: dict[str, Any] = {}
    files: dict[str, Any] = {}  # apart from the arms' settings: folders from before they were told say nothing of them
    for cell in cells:
        # Neither the empty context nor a worker's own full cache, which is not recorded, has settings.
        if cell.bare or isinstance(cell, PressArm) and not cell.compresses:
            continue
        if cell.name not in arms:
            files[f"files.{cell.name}"] = cell.files(subject.model) or None
        arms[cell.name] = {k: v for k, v in cell.settings().items() if k not in ("ratio", "budget")}
    settings = {
        "experiment": experiment.name,
        "model": subject.spec.name,
        "max_length": subject.spec.max_length,
        "chat_template": subject.spec.chat_template,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "protocol": protocol,
        "ids_sha256": sample.sha256,
        "contents_sha256": contents,
        "prompts": {name: task.sha256 for name, task in tasks.items()},
        "texts": texts and texts_sha256(texts),
        "windows": texts and dataclasses.asdict(experiment.texts),
        "arms": arms,
        "weights_sha256": models.weights_sha256(subject.model),
        **files,
    }
    return json.loads(json.dumps(settings, default=str))
