"""Runs a plan of arms over lengths, summaries and LongBench rows into a folder, and goes on where it stopped."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from asymkv.experiments.arms import METHOD_GROUP, Plan, SuiteArm
from asymkv.experiments.checkpoint import Checkpoint, load_weights
from asymkv.experiments.corpus import digest, read_articles, read_text, windows
from asymkv.experiments.measure import Record, measure_text
from asymkv.experiments.prepare import prepare
from asymkv.experiments.tasks import answer_row, article_room, summarise
from asymkv.files import sha256_file
from asymkv.fingerprint import fingerprint
from asymkv.longbench import models, runner
from asymkv.longbench.arms import ArmError
from asymkv.longbench.data import Row, Task, contents_sha256, load_rows, load_tasks
from asymkv.longbench.measure import Protocol, Subject
from asymkv.longbench.records import RecordFolder
from asymkv.provenance import files_of

TEXT, SUMMARY, LONGBENCH = "text", "summary", "longbench"
KEY_FIELDS = ("kind", "arm", "length", "item")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and on what.

    Args:
        model: short name, hub id or folder.
        out: folder of records and results.
        text: see :func:`asymkv.experiments.corpus.read_text`; ``text_config`` of a dataset.
        lengths: tokens of the windows that methods read.
        ablation_lengths: tokens of those that ablations read; beyond the model's window, they read that.
        samples: windows of each length.
        batch: windows read at a time.
        decode_steps: generated tokens that are timed behind each window.
        summaries: a jsonl file or dataset of articles; None = no summaries.
        longbench: tasks; ``data_dir``, ``longbench_config`` and ``changed_prompts`` as in ``scripts/pred.py``.
        new_tokens: of a summary.
        dtype, device: of model and cache.
        calibration: a text as ``text`` is one, to measure head scores and bases on that methods lack; None = such
            methods are refused.
        cache_dir: of the ``datasets`` library.
    """

    model: str
    out: Path
    text: str
    text_config: str | None = None
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    ablation_lengths: tuple[int, ...] = (2048,)
    samples: int = 10
    batch: int = 1
    decode_steps: int = 16
    summaries: str | None = None
    longbench: tuple[str, ...] = ()
    data_dir: str | None = None
    longbench_config: str | None = None
    changed_prompts: bool = False
    new_tokens: int = 128
    dtype: str = "auto"
    device: str = "cpu"
    calibration: str | None = None
    cache_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to measure for every arm of some groups: ``run`` gives a record per item."""

    kind: str
    length: int
    items: tuple[str, ...]
    methods_only: bool
    run: Callable[[SuiteArm], list[Record]]


def run_suite(options: Options, plan: Plan) -> dict[str, Any]:
    """Measures what the folder lacks.

    Returns:
        ``records``, ``refused`` (arm: why), ``skipped`` (what cannot be measured with any arm: why), ``conditions``
        and ``arms`` (name: group and settings).

    Raises:
        ValueError: for a folder of other settings, texts that cannot be had, a checkpoint of another model, or nothing
            that can be measured.
    """
    suite = Suite(options, plan)
    try:
        for checkpoint in dict.fromkeys(arm.checkpoint for arm in suite.plan.arms):
            suite.run(checkpoint, [arm for arm in suite.plan.arms if arm.checkpoint == checkpoint])
    finally:
        suite.folder.release()
    return suite.results()


class Suite:
    """A run into a folder.

    Args:
        options: what is measured.
        plan: the arms.
    """

    def __init__(self, options: Options, plan: Plan) -> None:
        self.options = options
        self.refused = dict(plan.refused)
        self.skipped: dict[str, str] = {}
        self.spec = models.resolve_spec(options.model, max_length=sys.maxsize, chat_template=False)
        self.base: Record | None = None  # what the model without a checkpoint is known by
        self.checkpoints = {path: Checkpoint.find(path) for path in {a.checkpoint for a in plan.arms} if path}
        for found in self.checkpoints.values():
            found.check_shape(self.spec)  # before anything is measured
        # A path says nothing of what lies there: the arm is known by its weights.
        self.plan = Plan([dataclasses.replace(a, weights=self.checkpoints[a.checkpoint].sha256) if a.checkpoint else a
                          for a in plan.arms], plan.refused)  # fmt: skip
        self.tokenizer = models.load_tokenizer(self.spec)
        text = read_text(options.text, config=options.text_config, cache_dir=options.cache_dir)
        self.ids = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        self.folder = RecordFolder(options.out / "records", lambda record: tuple(record[name] for name in KEY_FIELDS))
        self.conditions: Record = {}
        self.article_tokens: int | None = None

    def run(self, checkpoint: str | None, arms: Sequence[SuiteArm]) -> None:
        """Measures some arms with one set of weights."""
        self._check_base(checkpoint)
        model = load_weights(self.spec, checkpoint, self.options.dtype, self.options.device)
        if checkpoint is None:
            self.base = fingerprint(model, any_dtype=True)
            self._prepare(model)
        window = int(getattr(model.config, "max_position_embeddings", sys.maxsize))
        spec = dataclasses.replace(self.spec, max_length=window)
        subject = Subject(model, self.tokenizer, spec, models.stop_ids(spec, model, self.tokenizer))
        self.conditions = runner.conditions(subject, runner.Ranks(0, 1, torch.device(self.options.device)))
        self.folder.claim(self._settings(model, arms), self.conditions)
        jobs = list(self._jobs(subject, window))
        if self.skipped and not any(self._arms(job, arms) for job in jobs):
            raise ValueError(f"nothing can be measured: {'; '.join(f'{k}: {v}' for k, v in self.skipped.items())}")
        records = {self.folder.key(record): record for record in self.folder.read()}
        with tqdm(total=sum(len(self._arms(job, arms)) for job in jobs), unit="arm") as bar:
            for job in jobs:
                for arm in self._arms(job, arms):
                    bar.set_postfix_str(f"{job.kind} {job.length} {arm.name}", refresh=False)
                    self._measure(job, arm, records)
                    bar.update()

    def _prepare(self, model: PreTrainedModel) -> None:
        """Measures what methods lack of the model, on a text that is not the one that they are compared on."""
        name = self.options.calibration
        if name is not None:
            made = prepare(model, self.tokenizer, [arm.config for arm in self.plan.arms],
                           lambda: read_text(name, cache_dir=self.options.cache_dir))  # fmt: skip
            if made:
                logger.warning("measured on %s for this model, once: %s", name, ", ".join(made))

    def _check_base(self, checkpoint: str | None) -> None:
        """Raises ValueError for weights that were trained from another model, where it is known from which."""
        if checkpoint is None or self.checkpoints[checkpoint].base is None:
            return
        if self.base is None:
            self.base = fingerprint(load_weights(self.spec, None, self.options.dtype, "cpu"), any_dtype=True)
        self.checkpoints[checkpoint].check_base(self.spec, self.base)

    def _arms(self, job: Job, arms: Sequence[SuiteArm]) -> list[SuiteArm]:
        return [arm for arm in arms if (arm.group == METHOD_GROUP) == job.methods_only]

    def _measure(self, job: Job, arm: SuiteArm, records: dict[Any, Record]) -> None:
        """Adds an arm's records of a job, measured, or taken over from an arm that is the same but for its name."""
        if arm.name in self.refused or all((job.kind, arm.name, job.length, item) in records for item in job.items):
            return
        twins = [a.name for a in self.plan.arms if a.identity == arm.identity]
        found: list[Record] = []
        for name in twins:
            known = [records.get((job.kind, name, job.length, item)) for item in job.items]
            if all(known):
                found = [{k: v for k, v in each.items() if k not in KEY_FIELDS} for each in known if each]
                break
        try:
            found = found or job.run(arm)
        except (ValueError, ImportError, ArmError, torch.OutOfMemoryError) as error:
            self.refused[arm.name] = f"{job.kind}, {job.length} tokens: {error}"
            logger.error("%s is not measured: %s", arm.name, self.refused[arm.name])
            return
        for item, values in zip(job.items, found, strict=True):
            key = (job.kind, arm.name, job.length, item)
            if key not in records:
                records[key] = {**dict(zip(KEY_FIELDS, key, strict=True)), **values}
                self.folder.append(records[key])

    def _jobs(self, subject: Subject, window: int) -> Iterator[Job]:
        """Short texts first; the arms of a text in turn, so that an unfinished run compares them on the same ones."""
        for length in sorted(self.options.lengths):
            if self._fits(f"{length:,} tokens", length, window):
                yield from self._text_jobs(subject, length, methods_only=True)
        if any(arm.group != METHOD_GROUP for arm in self.plan.arms):
            for length in sorted({min(n, window) for n in self.options.ablation_lengths}):
                if self._fits(f"ablations at {length:,} tokens", length, window):
                    yield from self._text_jobs(subject, length, methods_only=False)
        yield from self._summary_jobs(subject, window)
        yield from self._longbench_jobs(subject, window)

    def _fits(self, what: str, length: int, window: int) -> bool:
        """Whether a window of so many tokens can be had; what cannot is told in the results."""
        if length > window:
            self.skipped[what] = f"beyond the model's window of {window:,}"
        elif length > len(self.ids):
            self.skipped[what] = f"the text has {len(self.ids):,}"
        return length <= min(window, len(self.ids))

    def _summary_jobs(self, subject: Subject, window: int) -> Iterator[Job]:
        if self.options.summaries is None:
            return
        self.article_tokens = most = min(window, max(self.options.lengths, default=window))
        try:
            article_room(self.tokenizer, most, self.options.new_tokens)
        except ValueError as error:
            self.skipped["summaries"] = str(error)
            return
        articles = read_articles(self.options.summaries, self.options.samples, cache_dir=self.options.cache_dir)
        for index, article in enumerate(articles):
            def summary(arm: SuiteArm, article: Any = article) -> list[Record]:
                return [summarise(subject, arm, article, most, self.options.new_tokens)]

            yield Job(SUMMARY, most, (str(index),), True, summary)

    def _text_jobs(self, subject: Subject, length: int, *, methods_only: bool) -> Iterator[Job]:
        found = windows(self.ids, length, self.options.samples)
        for begin in range(0, len(found), self.options.batch):
            batch = torch.stack(found[begin : begin + self.options.batch])

            def text(arm: SuiteArm, batch: Tensor = batch) -> list[Record]:
                return measure_text(subject.model, arm, batch, self.options.decode_steps)

            items = tuple(str(begin + i) for i in range(len(batch)))
            yield Job(TEXT, length, items, methods_only, text)

    @functools.cached_property
    def longbench(self) -> dict[str, tuple[Task, list[Row]]]:
        """Prompt and rows of each dataset."""
        options, names = self.options, list(self.options.longbench)
        tasks = load_tasks(names, options.longbench_config, changed_prompts=options.changed_prompts) if names else {}
        return {name: (tasks[name], load_rows(name, data_dir=options.data_dir, max_samples=options.samples))
                for name in names}  # fmt: skip

    def _longbench_jobs(self, subject: Subject, window: int) -> Iterator[Job]:
        for name, (asked, rows) in self.longbench.items():
            for row in rows:
                def answer(arm: SuiteArm, row: Any = row, task: Any = asked) -> list[Record]:
                    limited = dataclasses.replace(subject.spec, max_length=window - task.max_new_tokens)
                    return [answer_row(dataclasses.replace(subject, spec=limited), arm, task, row, Protocol())]

                yield Job(LONGBENCH, 0, (f"{name}/{row['_id']}",), True, answer)

    def _settings(self, model: PreTrainedModel, arms: Sequence[SuiteArm]) -> Record:
        """Everything that the numbers depend on."""
        plain = dataclasses.asdict(self.options)
        settings = {name: plain[name] for name in ("samples", "batch", "decode_steps", "new_tokens")}
        for name, (task, rows) in self.longbench.items():
            settings |= {f"prompt.{name}": task.sha256, f"contents.{name}": contents_sha256(rows)}
        of_model = all(arm.checkpoint is None for arm in arms)  # those of a checkpoint are in its arms
        settings |= {"model": self.spec.path, "dtype": str(model.dtype).removeprefix("torch."),
                     "device": model.device.type, "tokens_sha256": digest(self.ids),
                     "model_sha256": fingerprint(model)["weights_sha256"] if of_model else None,
                     "summaries": self.options.summaries}  # fmt: skip
        if self.options.summaries is not None and Path(self.options.summaries).is_file():
            settings["summaries_sha256"] = sha256_file(Path(self.options.summaries))
        settings["arms"] = {arm.name: json.loads(arm.identity) for arm in arms}
        settings |= {f"files.{arm.name}": files_of(arm.config, model) or None for arm in arms}
        return json.loads(json.dumps(settings, default=str))

    def results(self) -> dict[str, Any]:
        """Records and what is to be said of them."""
        arms = {arm.name: {"group": arm.group, "config": arm.config.to_dict(), "stride": arm.stride,
                           "against": arm.against} for arm in self.plan.arms}  # fmt: skip
        wanted = set(arms)
        records = [r for r in self.folder.read() if r["arm"] in wanted]
        # Articles that a run of other lengths cut otherwise are other articles.
        cut = self.article_tokens or max((r["length"] for r in records if r["kind"] == SUMMARY), default=0)
        records = [r for r in records if r["kind"] != SUMMARY or r["length"] == cut]
        text = self.options.text
        named = Path(text).name if Path(text).exists() else text
        return {"records": records, "refused": self.refused, "skipped": self.skipped, "arms": arms,
                "conditions": {**self.conditions, "model": self.spec.name, "text": named}}  # fmt: skip
