"""Rows in LongBench's format, and the prompt and answer length of each task.

Rows come from a folder of ``<task>.jsonl`` files, from the hub, or, for the embedded tasks, from text that every
Python installation carries. A row has LongBench's fields: ``input, context, answers, length, dataset, language,
all_classes, _id``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import logging
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asymkv.checks import check_integer
from asymkv.longbench import files
from asymkv.longbench.jsonl import numbered_objects, shown
from asymkv.longbench.prompts import check_template
from asymkv.longbench.rows import E_SUFFIX, REQUIRED_FIELDS, Row, parse_rows
from asymkv.paths import config_path

if TYPE_CHECKING:
    from asymkv.longbench.suites import Reader

logger = logging.getLogger(__name__)

ENGLISH_TASKS = (
    "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum",
    "multi_news", "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
CHINESE_TASKS = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
LONGBENCH_TASKS = ENGLISH_TASKS + CHINESE_TASKS
LONGBENCH_E_TASKS = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip

HUB_DATASET = "THUDM/LongBench"
CONFIG_URL = "https://raw.githubusercontent.com/THUDM/LongBench/main/LongBench/config/"
CONFIG_SHA256 = {
    "dataset2prompt.json": "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30",
    "dataset2maxlen.json": "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """How one dataset is asked.

    Args:
        dataset: the task's name.
        template: prompt format with ``{context}`` and, mostly, ``{input}``.
        max_new_tokens: longest answer.
        raw: never asked in a chat turn (LongBench's own raw tasks are known by name).
        answer_prefix: format of the first words of the answer, which the prompt ends with, behind the chat template.
        newline_stop: a newline ends the answer, and no answer is empty.
        all_answers: an answer must name all references, and not any one of them.
        record_fields: fields of a row that its record repeats.
    """

    dataset: str
    template: str
    max_new_tokens: int
    raw: bool = False
    answer_prefix: str = ""
    newline_stop: bool = False
    all_answers: bool = False
    record_fields: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Digest of prompt and answer length."""
        return files.sha256(f"{self.template}{self.answer_prefix}\n{self.max_new_tokens}".encode())

    def gold(self, answers: Sequence[str]) -> list[str]:
        """The answers to take the loss of."""
        return [", ".join(answers)] if self.all_answers and answers else list(answers)


@cache
def embedded_tasks() -> dict[str, Task]:
    """Returns the tasks whose prompts are this package's own (``configs/longbench/embedded.json``)."""
    table = json.loads(config_path("longbench/embedded.json").read_text(encoding="utf-8"))
    return {name: Task(name, entry["prompt"], entry["max_new_tokens"]) for name, entry in table.items()}


def load_tasks(
    datasets: Iterable[str],
    longbench_config: str | Path | None = None,
    *,
    changed_prompts: bool = False,
    groups: Iterable[str] = (),
) -> dict[str, Task]:
    """Returns prompt and answer length for each dataset.

    Args:
        datasets: task names, LongBench's, embedded or of a suite; LongBench-E names may carry their suffix ``_e``.
        longbench_config: folder with LongBench's ``dataset2prompt.json`` and ``dataset2maxlen.json``; without it
            LongBench's files are fetched once, checked and cached. Embedded tasks and suites need neither.
        changed_prompts: whether the files of ``longbench_config`` may be others than LongBench's.
        groups: names of several tasks that the caller takes too; an error lists them.

    Raises:
        ValueError: for an unknown task, or a prompt or length that cannot be used; names file and entry. For files
            that are not LongBench's own, unless ``changed_prompts``.
        OSError: if LongBench's files cannot be fetched; says what to do instead.
    """
    from asymkv.longbench import suites

    names = list(datasets)
    tasks = {name: embedded_tasks()[name] for name in names if name in embedded_tasks()}
    tasks |= {name: found.task for name in names if (found := suites.find(name)) is not None}
    rest = [name for name in names if name not in tasks]
    if longbench_config is None:
        for name in rest:
            _check_known(name, LONGBENCH_TASKS, groups)
    if not rest:
        return tasks
    paths = [_config_file(name, longbench_config, changed_prompts) for name in CONFIG_SHA256]
    prompts, lengths = (_read_table(path) for path in paths)
    for name in rest:
        base = name.removesuffix(E_SUFFIX)
        if base not in prompts or base not in lengths:
            _check_known(name, [task for task in prompts if task in lengths], groups)
        check_template(prompts[base], f"{paths[0]}: {base!r}")
        if type(lengths[base]) is not int or lengths[base] < 1:
            raise ValueError(f"{paths[1]}: {base!r} must be a number of tokens, found {shown(lengths[base])}")
        tasks[name] = Task(name, prompts[base], lengths[base])
    return tasks


def _check_known(name: str, asked: Collection[str], groups: Iterable[str]) -> None:
    """Raises ValueError for a task without a prompt.

    Args:
        name: of the task; LongBench-E's may carry their suffix.
        asked: tasks that LongBench's files have prompts for.
        groups: further names that would have been allowed.
    """
    from asymkv.longbench import suites

    if name.removesuffix(E_SUFFIX) not in asked:
        known = list(dict.fromkeys([*groups, *embedded_tasks(), *asked, *suites.names()]))
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown task {name!r}{hint}: no prompt for it; known: {', '.join(known)}")


def _config_file(name: str, folder: str | Path | None, changed_prompts: bool) -> Path:
    if folder is None:
        return _fetched_config(name)
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --longbench-config takes the config/ folder of LongBench")
    found = files.sha256_file(path)
    if found != CONFIG_SHA256[name]:
        differs = f"{path} has sha256 {found}, LongBench's own {CONFIG_SHA256[name]}: scores are not LongBench's"
        if not changed_prompts:
            raise ValueError(f"{differs}; if the prompts are meant to differ, say changed_prompts (--changed-prompts)")
        logger.warning(differs)
    return path


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} must be a JSON object of tasks, found {shown(table)}")
    return table


def _fetched_config(name: str) -> Path:
    """Fetches one of LongBench's config files on first use; its sha256 must be the published one."""
    from http.client import HTTPException
    from urllib.request import urlopen

    path = files.cache_dir() / "longbench" / name
    with files.exclusive(f"longbench-{name}"):
        if path.is_file() and files.sha256_file(path) == CONFIG_SHA256[name]:
            return path
        instead = "pass longbench_config (--longbench-config DIR), the config/ folder of a LongBench checkout"
        try:
            with urlopen(CONFIG_URL + name, timeout=30) as response:
                data = response.read()
        except (OSError, HTTPException) as error:
            raise OSError(f"cannot fetch {CONFIG_URL + name} ({error}); {instead}") from error
        found = files.sha256(data)
        if found != CONFIG_SHA256[name]:
            raise ValueError(
                f"{CONFIG_URL + name} has another sha256 ({found}) than {CONFIG_SHA256[name]}; not using it; {instead}"
            )
        files.write_atomic(path, data.decode("utf-8"))
    return path


def available_datasets(data_dir: str | Path | None = None) -> list[str]:
    """Returns the tasks a folder holds (``*.jsonl``), or the embedded ones where no folder is given."""
    if data_dir is None:
        return list(embedded_tasks())
    names = sorted(path.stem for path in Path(data_dir).glob("*.jsonl"))
    if not names:
        raise FileNotFoundError(f"no .jsonl files in {data_dir}")
    return names


def load_rows(
    dataset: str,
    *,
    data_dir: str | Path | None = None,
    max_samples: int | None = None,
    row_ids: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    reader: Reader | None = None,
) -> list[Row]:
    """Returns the rows of one dataset, in file order.

    Args:
        dataset: task name.
        data_dir: folder with ``<dataset>.jsonl``, or the files that a suite reads. Without it, embedded tasks are built
            and others come from the hub.
        max_samples: keep only the first so many.
        row_ids: keep only these ``_id``s, in this order; an unknown one raises.
        options: settings of the dataset's rows: sizes of an embedded task (:mod:`asymkv.longbench.embedded`), or what
            a suite's dataset takes (:mod:`asymkv.longbench.suites`). Others have none.
        reader: the model's tokenizer and prompt rules, for rows that are generated at a length in tokens.
    """
    from asymkv.longbench import suites

    if max_samples is not None:
        check_integer("max_samples", max_samples, 1)
    suite = suites.find(dataset)
    if suite is not None:
        rows = suite.build(suites.Source(None if data_dir is None else Path(data_dir), reader), options or {})
    elif options and (data_dir is not None or dataset not in embedded_tasks()):
        where = HUB_DATASET if data_dir is None else data_dir
        raise ValueError(f"{dataset} is read from {where} and takes no options, found {', '.join(options)}")
    elif data_dir is not None:
        path = _existing(Path(data_dir) / f"{dataset}.jsonl")
        rows = parse_rows(path.read_bytes(), str(path), dataset)
    elif dataset in embedded_tasks():
        from asymkv.longbench.embedded import build_rows

        rows = build_rows(dataset, **(options or {}))
    else:
        rows = _hub_rows(dataset)
    _identify(dataset, rows)
    if row_ids is not None:
        by_id = {row["_id"]: row for row in rows}
        missing = [row_id for row_id in row_ids if row_id not in by_id]
        if missing:
            raise ValueError(f"{dataset} has no rows {missing[:5]}{' ...' if len(missing) > 5 else ''}")
        rows = [by_id[row_id] for row_id in row_ids]
    return rows[:max_samples]


def read_jsonl(path: Path) -> list[Row]:
    """Reads one JSON object a line; the error for a bad line names file, line and field."""
    return [row for _, row in numbered_objects(_existing(path).read_bytes(), str(path))]


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    stems = sorted(other.stem for other in path.parent.glob("*.jsonl"))
    hint = f"; the folder holds: {', '.join(stems) or 'nothing'}"
    if path.stem.endswith(E_SUFFIX):
        hint += f" (LongBench-E's rows are its own: {path.stem.removesuffix(E_SUFFIX)}.jsonl does not stand in for it)"
    raise FileNotFoundError(f"{path} does not exist{hint}")


def _hub_rows(dataset: str) -> list[Row]:
    """Reads a task from the hub's archive.

    The dataset repository is a loading script around ``data.zip``, and ``datasets`` 4 and later run no scripts; its
    rows are these files, unchanged.
    """
    known_e = [f"{name}{E_SUFFIX}" for name in LONGBENCH_E_TASKS]
    if dataset not in LONGBENCH_TASKS and dataset not in known_e:
        from asymkv.longbench import suites

        known = ", ".join([*embedded_tasks(), *LONGBENCH_TASKS, *known_e, *suites.names()])
        raise ValueError(f"unknown dataset {dataset!r}; known without --data-dir: {known}")
    from huggingface_hub import hf_hub_download

    try:
        archive = hf_hub_download(HUB_DATASET, "data.zip", repo_type="dataset")
    except OSError as error:
        raise OSError(
            f"cannot get {HUB_DATASET} from the hub ({error}); pass data_dir (--data-dir DIR), a folder with "
            f"{dataset}.jsonl, or run the embedded tasks: {', '.join(embedded_tasks())}"
        ) from error
    with zipfile.ZipFile(archive) as zipped:
        return parse_rows(zipped.read(f"data/{dataset}.jsonl"), f"{archive}:data/{dataset}.jsonl", dataset)


def _identify(dataset: str, rows: list[Row]) -> None:
    """Checks the fields and makes every ``_id`` unique, so that arms can be joined and runs resumed.

    A row without ``_id`` gets one from its content; the second row with the same one becomes ``<id>#2``, and so on
    (LongBench itself scores such a row twice).
    """
    seen: Counter[str] = Counter()
    for index, row in enumerate(rows):
        absent = [field for field in REQUIRED_FIELDS if field not in row]
        if absent:
            raise ValueError(f"row {index} of {dataset} lacks {', '.join(absent)}")
        content = json.dumps([row[field] for field in REQUIRED_FIELDS], ensure_ascii=False)
        row_id = row.get("_id") or files.sha256(content.encode("utf-8"))[:48]
        seen[row_id] += 1
        row["_id"] = row_id if seen[row_id] == 1 else f"{row_id}#{seen[row_id]}"


def ids_sha256(ids: Iterable[str]) -> str:
    """Digest of an ordered list of row ids: two results with the same digest are of the same rows."""
    return files.sha256("\n".join(ids).encode("utf-8"))


def contents_sha256(rows: Iterable[Row]) -> str:
    """Digest of all fields of rows, in their order: ids say nothing of a text that was cut or answered otherwise."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()
