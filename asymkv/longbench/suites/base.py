"""What a benchmark suite is made of, and reading published files with errors that say where."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asymkv.longbench import models
from asymkv.longbench.data import Task
from asymkv.longbench.files import sha256
from asymkv.longbench.jsonl import check_finite, numbered_objects, read_json, shown
from asymkv.longbench.prompts import prompt_tokens
from asymkv.longbench.rows import Row, check_ids, check_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reader:
    """The model's tokenizer and prompt rules, loaded on first use: measures generated rows in the model's own tokens.

    Args:
        spec: how the model is prompted.
        tokenizer: the model's; loaded by the spec where none is given.
    """

    def __init__(self, spec: models.ModelSpec, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.spec = spec
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = models.load_tokenizer(self.spec)
        return self._tokenizer

    def prompt_tokens(self, row: Row, task: Task) -> int:
        """Tokens of a row's whole prompt, chat template and answer prefix included, nothing cut."""
        return prompt_tokens(
            row, task.dataset, task.template, self.tokenizer, self.spec, raw=task.raw, answer_prefix=task.answer_prefix
        )

    def sizes(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as it stands behind a space."""
        ids = self.tokenizer([f" {text}" for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
        return [len(found) for found in ids]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        data_dir: local folder; None = the hub, or generated.
        reader: the model's tokenizer and prompt rules, for rows of a given length in tokens.
    """

    data_dir: Path | None = None
    reader: Reader | None = None

    def need_reader(self, dataset: str) -> Reader:
        """The reader; raises where there is none."""
        if self.reader is None:
            raise ValueError(f"{dataset} is generated at a length in tokens and needs the model's tokenizer")
        return self.reader


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One dataset.

    Args:
        task: how it is asked.
        rows: called with the source and the dataset's options as keywords; rows in LongBench's fields.
        score: score in [0, 1] of one record, or of one turn of it, by its ``pred`` and ``answers``.
        details: further scores in percent, by name, of all records.
        reads: fields of a record, or of a turn of it, that the scores read beside ``pred`` and ``answers``.
        refuse: why the scores cannot read the values of these fields in a record, or in a turn of it; None if they can.
    """

    task: Task
    rows: Callable[..., list[Row]]
    score: Callable[[Row], float]
    details: Callable[[Sequence[Row]], dict[str, float]] | None = None
    reads: tuple[str, ...] = ()
    refuse: Callable[[Row], str | None] | None = None

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.task.dataset

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the settings that the rows take."""
        found = inspect.signature(self.rows).parameters.values()
        return tuple(p.name for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY)

    def build(self, source: Source, options: Mapping[str, Any]) -> list[Row]:
        """The rows under these settings.

        Raises:
            ValueError: for a setting that the dataset does not have (lists those it has), and for bad data: no rows at
                all, a row without what every row has, or an ``_id`` of two rows.
        """
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            raise ValueError(f"{self.name} has no options {unknown}; allowed: {', '.join(self.options) or 'none'}")
        made = self.rows(source, **options)
        placed = [(f"{self.name}, row {index}", entry) for index, entry in enumerate(made)]
        for place, entry in placed:
            check_row(self.name, entry, place)
            for turn in turns_of(entry):
                self.check(turn, place)
        check_ids(placed)
        if not made:
            raise ValueError(f"{self.name} has no rows in {source.data_dir or 'what it is read from'}")
        return made

    def check(self, record: Row, place: str) -> None:
        """Checks what the scores read of a record, or of a turn of it; errors begin with ``place``."""
        if not record["answers"]:
            raise ValueError(f"{place}: field 'answers' is empty")
        reason = self.refuse(record) if self.refuse is not None else None
        if reason is not None:
            raise ValueError(f"{place}: {reason}")

    def total(self, records: Sequence[Row]) -> float:
        """Mean score in percent, two decimals; each turn of a record counts like a row."""
        return percent([self.score(turn) for record in records for turn in turns_of(record)])


@dataclasses.dataclass(frozen=True)
class Suite:
    """Datasets that belong together.

    Args:
        name: what ``--datasets`` takes for all of them.
        benchmarks: the datasets.
        apart: names that run only when they are asked for.
    """

    name: str
    benchmarks: tuple[Benchmark, ...]
    apart: frozenset[str] = frozenset()

    @property
    def group(self) -> tuple[str, ...]:
        """The datasets that the suite's name stands for."""
        return tuple(benchmark.name for benchmark in self.benchmarks if benchmark.name not in self.apart)


def turns_of(record: Row) -> Sequence[Row]:
    """The questions of a record: its turns, or itself."""
    return record.get("turns") or [record]


def percent(scores: Sequence[float]) -> float:
    """Mean times 100, two decimals.

    Raises:
        ValueError: for no scores.
    """
    if not scores:
        raise ValueError("nothing to score")
    return round(100 * sum(scores) / len(scores), 2)


def row(dataset: str, context: str, question: str, answers: Sequence[str], **extra: Any) -> Row:
    """A row in LongBench's fields whose id follows from all of its content."""
    content = json.dumps([dataset, context, question, list(answers), extra], ensure_ascii=False, sort_keys=True)
    return {
        "input": question, "context": context, "answers": list(answers), "length": len(context.split()),
        "dataset": dataset, "language": "en", "all_classes": None, "_id": sha256(content.encode("utf-8"))[:48], **extra,
    }  # fmt: skip


def find_file(data_dir: Path, names: Sequence[str]) -> Path:
    """The first of these files that the folder has.

    Raises:
        FileNotFoundError: if it has none; says what was looked for and what is there.
    """
    for name in names:
        if (data_dir / name).is_file():
            return data_dir / name
    there = sorted(path.name for path in data_dir.iterdir()) if data_dir.is_dir() else []
    listed = ", ".join(there[:20]) + (" ..." if len(there) > 20 else "")
    raise FileNotFoundError(f"{data_dir} has none of {', '.join(names)}; it holds: {listed or 'nothing'}")


def read_records(path: Path) -> list[tuple[str, Row]]:
    """Records of a jsonl file, or of a json file that is a list, each with where it stands.

    Raises:
        ValueError: for a file or line that is not JSON, or a record that is no object.
    """
    if path.suffix != ".json":
        return list(numbered_objects(path.read_bytes(), str(path)))
    table = read_json(path)
    if not isinstance(table, list):
        raise ValueError(f"{path} must hold a list of records, found {type(table).__name__}")
    found = [(f"{path}, record {index}", record) for index, record in enumerate(table)]
    for where, record in found:
        if not isinstance(record, dict):
            raise ValueError(f"{where} must be a JSON object, found {shown(record)}")
        check_finite(record, where)
    return found


def hub_records(repository: str, config: str | None, split: str, files: Sequence[str]) -> list[tuple[str, Row]]:
    """Records of a dataset on the hub, each with where it stands.

    Args:
        repository: hub id.
        config: its configuration; None = the only one.
        split: which part.
        files: local files that would do as well, for the error.

    Raises:
        OSError: if it cannot be loaded, no network included.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("rows from the hub need the datasets package: pip install asymkv[eval]") from error
    try:
        table = datasets.load_dataset(repository, config, split=split)
    except Exception as error:
        raise OSError(
            f"cannot load {repository} ({config or split}) from the hub: {type(error).__name__}: {error}; "
            f"with --data-dir, one of {', '.join(files)} is read instead"
        ) from error
    return [(f"{repository}/{config or split}, record {index}", dict(record)) for index, record in enumerate(table)]


def get(record: Mapping[str, Any], name: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    """One field of a record.

    Raises:
        ValueError: if it is missing or of another type; names place, field and what was found.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} must be an object with fields, found {type(record).__name__}: {str(record)[:60]!r}")
    if name not in record:
        raise ValueError(f"{where} lacks the field {name!r}; it has {', '.join(map(str, record)) or 'none'}")
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = " or ".join(entry.__name__ for entry in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}: field {name!r} must be {wanted}, found {type(value).__name__}: {str(value)[:60]!r}")
    return value


def choice(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """A setting that must be one of a few values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, found {value!r}")
    return value


def count(name: str, value: Any, least: int = 1) -> int:
    """A setting that must be a whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, found {value!r}")
    return value
