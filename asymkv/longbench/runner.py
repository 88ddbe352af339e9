"""Runs arms over datasets, alone or under torchrun, so that a killed run goes on where it stopped.

Every arm has a folder of its own. Rank r measures rows r, r + world, ... and appends each record to its own file, on
disk before the next row starts; when all ranks are through, rank 0 merges the files by row index, checks that every
index is there, and writes one ``<dataset>.jsonl`` per dataset and ``run.json``. A folder takes one setting: another
one is refused with the names of the keys that differ.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asymkv.longbench import data, half_precision, models, peers, suites
from asymkv.longbench.arms import ArmError, BaseArm
from asymkv.longbench.checks import check_asked, refused_prompts
from asymkv.longbench.conditions import conditions as conditions_of
from asymkv.longbench.data import Row, Task
from asymkv.longbench.files import write_atomic
from asymkv.longbench.jsonl import read_object
from asymkv.longbench.measure import Protocol, Record, Subject, measure
from asymkv.longbench.press_arms import PressArm, PressError
from asymkv.longbench.ranks import Ranks, distributed, gathered, wait_for_all
from asymkv.longbench.records import RecordFolder, Shard, conflicts, merged_settings
from asymkv.longbench.suites import Reader

RUN_FILE = "run.json"
# What a failed worker's refusal is told under: it measures all presses.
PRESSES = "presses of kvpress"
# Of a record: where its time went, and the most memory that its process held.
SECONDS = ("prefill_seconds", "question_seconds", "decode_seconds")
PEAKS = ("peak_rss_bytes", "device_peak_bytes")

logger = logging.getLogger(__name__)
__all__ = ["Ranks", "Work", "distributed", "load_rows", "load_subject", "run", "wait_for_all"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is run.

    Args:
        arms: the arms, one after the other.
        tasks: prompt and answer length by dataset.
        rows: rows by dataset, in the order of their indices.
        protocol: how rows are measured.
    """

    arms: Sequence[BaseArm]
    tasks: Mapping[str, Task]
    rows: Mapping[str, Sequence[Row]]
    protocol: Protocol

    @property
    def own(self) -> Work:
        """Without the presses of kvpress."""
        return dataclasses.replace(self, arms=[arm for arm in self.arms if not isinstance(arm, PressArm)])

    @property
    def presses(self) -> Work:
        """The presses of kvpress alone."""
        return dataclasses.replace(self, arms=[arm for arm in self.arms if isinstance(arm, PressArm)])

    def share(self, dataset: str, ranks: Ranks) -> range:
        """Row indices of one dataset that a rank measures."""
        return range(ranks.rank, len(self.rows[dataset]), ranks.world)

    def count(self, ranks: Ranks) -> int:
        """Rows that a rank measures, over all arms."""
        return len(self.arms) * sum(len(self.share(dataset, ranks)) for dataset in self.rows)


def run(
    work: Work,
    subject: Subject,
    out_dir: str | Path,
    ranks: Ranks,
    *,
    progress: Callable[[str, str], None] | None = None,
    start_worker: Callable[[], Mapping[str, str] | None] | None = None,
) -> list[Path]:
    """Measures what is missing and returns the arms' folders.

    Args:
        work: arms, datasets and protocol.
        subject: the unpatched model and how it is prompted; each arm patches it and restores it.
        out_dir: the arms' folders go here.
        ranks: this process.
        progress: called as (arm, dataset) after each row of this rank, those found done included.
        start_worker: measures this rank's share of the presses of kvpress, by ``asymkv.longbench.press_runs`` in
            their environment, and returns those that were refused; needed where there are any.

    Raises:
        ValueError: before anything is measured, for what would stop the run later.
        ArmError: when the other arms are through and merged; names each arm that was refused, and why. PressError
            where that is nothing but the worker's failure.
    """
    check_asked(work.arms, work.tasks, work.rows, subject, work.protocol)
    started = time.perf_counter()
    stores = stores_of(work, out_dir, ranks)
    unpressed = _unpressed(work, stores, ranks)
    if unpressed and start_worker is None:
        raise ValueError(f"{unpressed[0].name} is a press of kvpress and needs a worker")
    if unpressed and ranks.is_main:
        peers.check([arm.press for arm in unpressed if arm.press])
    refused = refused_prompts(work.own.arms, work.tasks, work.rows, subject, work.protocol)
    for name, why in refused.items():
        logger.warning("%s is left out: %s", name, why)
    own = {arm.name: arm for arm in work.own.arms if arm.name not in refused}
    try:
        for name, arm in own.items():
            refuse_mixture(Path(out_dir), run_settings(arm, work, subject))
            stores[name].claim(run_settings(arm, work, subject), conditions(subject, ranks))
        # Every refusal of settings comes before the first row of any arm is measured.
        wait_for_all(ranks)
        for name, arm in own.items():
            refused |= refusal(name, partial(measure_arm, arm, stores[name], work, subject, ranks, progress))
        if unpressed and start_worker is not None:
            refused |= refusal(PRESSES, start_worker)
        # An arm that one rank was refused lacks rows for all of them.
        refused = gathered(refused, ranks)
        if ranks.is_main:
            for arm in work.arms:
                if arm.name not in refused and not (isinstance(arm, PressArm) and PRESSES in refused):
                    merge(arm, stores[arm.name], work, subject, ranks, time.perf_counter() - started)
        wait_for_all(ranks)
    finally:
        for name in own:
            stores[name].release()
    if refused:
        kind = PressError if set(refused) == {PRESSES} else ArmError
        raise kind("not measured:\n" + "\n".join(f"{name}: {why}" for name, why in refused.items()))
    return [store.folder for store in stores.values()]


def refusal(name: str, measured: Callable[[], Mapping[str, str] | None]) -> dict[str, str]:
    """Names of arms that could not be measured, and why: one arm must not take the others with it.

    Args:
        name: of the arm.
        measured: measures it; may return what else was refused within.
    """
    try:
        return dict(measured() or {})
    except ArmError as error:
        logger.warning("%s is left out: %s", name, error)
        return {name: str(error)}


def stores_of(work: Work, out_dir: str | Path, ranks: Ranks) -> dict[str, RecordFolder]:
    """Each arm's folder, with the files of this rank or of its worker."""
    shard = Shard(ranks.rank, ranks.world)
    worker = {arm.name: peers.WORKER for arm in work.presses.arms}
    return {a.name: RecordFolder(Path(out_dir) / a.name, _key, shard, worker.get(a.name, "")) for a in work.arms}


def _unpressed(work: Work, stores: Mapping[str, RecordFolder], ranks: Ranks) -> list[PressArm]:
    """Presses that lack rows of this rank's share."""
    wanted = {(dataset, index) for dataset in work.rows for index in work.share(dataset, ranks)}
    return [arm for arm in work.arms if isinstance(arm, PressArm) and wanted - stores[arm.name].done()]


def shared_settings(settings: Record) -> Record:
    """The settings that all arms of a comparison have in common: all but the cache's."""
    own = ("config.", "without_context")
    return {name: value for name, value in settings.items() if not name.startswith(own)}


def refuse_mixture(out_dir: Path, settings: Record) -> None:
    """Raises ValueError where another arm in ``out_dir`` has other rows, prompts or another model than ``settings``."""
    for path in sorted(out_dir.glob("*/run-*.json")):
        other = read_object(path)["settings"]
        differing = sorted(conflicts(shared_settings(other), shared_settings(settings)))
        if differing:
            raise ValueError(
                f"{path.parent} holds results of other settings: {', '.join(differing)} differ; take another --out"
            )


def _key(record: Record) -> tuple[str, int]:
    return record["dataset"], record["index"]


def measure_arm(
    arm: BaseArm,
    store: RecordFolder,
    work: Work,
    subject: Subject,
    ranks: Ranks,
    progress: Callable[[str, str], None] | None,
) -> None:
    """Measures what is missing of this rank's share under one arm."""
    done = store.done()
    with arm.applied(subject.model):
        for dataset, rows in work.rows.items():
            for index in work.share(dataset, ranks):
                peers.stop_if_orphaned()
                if (dataset, index) not in done:
                    start = time.perf_counter()
                    record = measure(subject, arm, work.tasks[dataset], rows[index], work.protocol)
                    elapsed = time.perf_counter() - start
                    store.append({"index": index, "arm": arm.name, **record, "wall_seconds": elapsed})
                if progress is not None:
                    progress(arm.name, dataset)


def merge(
    arm: BaseArm, store: RecordFolder, work: Work, subject: Subject, ranks: Ranks, session_seconds: float = 0.0
) -> None:
    """Writes ``<dataset>.jsonl`` in row order and ``run.json``; raises where an index is missing or has another row."""
    records = store.read()
    for dataset, rows in work.rows.items():
        merged = sorted((r for r in records if r["dataset"] == dataset), key=lambda r: r["index"])
        if [(r["index"], r["_id"]) for r in merged] != [(i, row["_id"]) for i, row in enumerate(rows)]:
            raise RuntimeError(
                f"{store.folder}: {dataset} has {len(merged)} records for {len(rows)} rows; all ranks, those of other "
                "nodes too, must see one folder (--out)"
            )
        write_atomic(
            store.folder / f"{dataset}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in merged)
        )
    runs = store.runs()
    # A dataset that an earlier, unfinished call began is not part of the results yet.
    whole = [r for r in records if (store.folder / f"{r['dataset']}.jsonl").exists()]
    report = {
        "arm": arm.name,
        "settings": merged_settings([*runs, {"settings": run_settings(arm, work, subject)}]),
        "in_force": arm.in_force(),
        "conditions": runs[-1]["sessions"][-1] if isinstance(arm, PressArm) else conditions(subject, ranks),
        "sessions": [session for run in runs for session in run["sessions"]],
        "results": {**summary(whole), "session_seconds": session_seconds},
    }
    del report["settings"]["arms"]
    write_atomic(store.folder / RUN_FILE, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def summary(records: Sequence[Record]) -> Record:
    """Totals of an arm: peak bytes, kept ratio, time spent, and rows with their digest by dataset."""
    by_dataset: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: r["index"]):
        by_dataset.setdefault(record["dataset"], []).append(record)
    seconds = {name: sum(r.get(name, 0.0) for r in records) for name in SECONDS}
    peaks = {name: max((r[name] for r in records if name in r), default=None) for name in PEAKS}
    return {
        "rows": len(records),
        "peak_kv_bytes": max((r["peak_bytes"] for r in records), default=0),
        "kept_ratio": sum(r["kept_ratio"] for r in records) / max(len(records), 1),
        **seconds,
        "measured_seconds": sum(seconds.values()),
        "wall_seconds": sum(r["wall_seconds"] for r in records),
        **{name: peak for name, peak in peaks.items() if peak is not None},
        "datasets": {
            name: {"rows": len(rows), "ids_sha256": data.ids_sha256(r["_id"] for r in rows)}
            for name, rows in by_dataset.items()
        },
    }


def run_settings(arm: BaseArm, work: Work, subject: Subject) -> Record:
    """Everything that the numbers depend on, flat, so that a conflict names its key."""
    settings = {
        "model": subject.spec.path,
        "max_length": subject.spec.max_length,
        "chat_template": subject.spec.chat_template,
        "stop_ids": sorted(subject.stop_ids),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": models.device_label(subject.model),
        "without_context": arm.bare,
        "protocol": work.protocol.name,
        "max_new_tokens": work.protocol.max_new_tokens,
        "generate": work.protocol.generate,
        "max_gold_tokens": work.protocol.max_gold_tokens,
        **{f"config.{key}": value for key, value in arm.settings().items()},
    }
    for dataset, rows in work.rows.items():
        task = work.tasks[dataset]
        settings[f"rows.{dataset}"] = data.ids_sha256(row["_id"] for row in rows)
        settings[f"contents.{dataset}"] = data.contents_sha256(rows)
        settings[f"prompt.{dataset}"] = task.sha256
    # None would mean "says nothing" to the record folder; an unset budget is a statement.
    plain = json.loads(json.dumps(settings, default=str))
    plain = {key: "none" if value is None else value for key, value in plain.items()}
    # None says nothing, as do folders from before these were told.
    files = arm.files(subject.model) or None
    return {**plain, "config.files": files, "weights_sha256": models.weights_sha256(subject.model)}


def conditions(subject: Subject, ranks: Ranks) -> Record:
    """What is recorded but not compared: machine, versions, commit, date."""
    spread = {name: str(place) for name, place in getattr(subject.model, "hf_device_map", {}).items()}
    return {
        **conditions_of(models.input_device(subject.model)),
        "world_size": ranks.world,
        "attention": subject.model.config._attn_implementation,
        **({"linear": "float32"} if half_precision.is_widened(subject.model) else {}),
        **({"device_map": spread} if spread else {}),
    }


def load_subject(
    spec: models.ModelSpec, device: torch.device, dtype: str = "auto", placement: models.Placement | None = None
) -> Subject:
    """Loads model and tokenizer.

    Args:
        spec: the model.
        device: where it goes.
        dtype: a torch dtype's name, or ``auto`` for the checkpoint's own.
        placement: spreads the model over devices instead.
    """
    # The tokenizer first: what is wrong with it shows before minutes of loading weights.
    tokenizer = models.load_tokenizer(spec)
    model = models.load_model(spec, dtype=dtype, device=device, placement=placement)
    return Subject(model, tokenizer, spec, models.stop_ids(spec, model, tokenizer))


def load_rows(
    datasets: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    max_samples: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    reader: Reader | None = None,
) -> dict[str, list[Row]]:
    """Rows by dataset.

    Args:
        datasets: task names.
        data_dir: local folder, see :func:`asymkv.longbench.data.load_rows`.
        max_samples: first so many rows of each.
        options: settings by dataset or suite.
        reader: the model's tokenizer and prompt rules, for rows generated at a length in tokens.
    """
    given = options or {}
    suites.check_options(given, data.embedded_tasks(), datasets)
    return {
        name: data.load_rows(
            name, data_dir=data_dir, max_samples=max_samples, options=suites.options_for(name, given), reader=reader
        )
        for name in datasets
    }
