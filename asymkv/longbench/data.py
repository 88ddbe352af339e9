"""Rows in LongBench's format, and the prompt and answer length of each task.

Rows come from a folder of ``<task>.jsonl`` files, from the hub, or, for the embedded tasks, from text that every
Python installation carries. A row has LongBench's fields: ``input, context, answers, length, dataset, language,
all_classes, _id``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asymkv.longbench import files
from asymkv.paths import config_path

if TYPE_CHECKING:
    from asymkv.longbench.suites import Reader

Row = dict[str, Any]

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

REQUIRED_FIELDS = ("input", "context", "answers")
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


def load_tasks(datasets: Iterable[str], longbench_config: str | Path | None = None) -> dict[str, Task]:
    """Returns prompt and answer length for each dataset.

    Args:
        datasets: task names, LongBench's, embedded or of a suite; LongBench-E names may carry their suffix ``_e``.
        longbench_config: folder with LongBench's ``dataset2prompt.json`` and ``dataset2maxlen.json``; without it
            LongBench's files are fetched once, checked and cached. Embedded tasks and suites need neither.
    """
    from asymkv.longbench import suites

    names = list(datasets)
    tasks = {name: embedded_tasks()[name] for name in names if name in embedded_tasks()}
    tasks |= {name: found.task for name in names if (found := suites.find(name)) is not None}
    rest = [name for name in names if name not in tasks]
    if not rest:
        return tasks
    prompts = _longbench_table("dataset2prompt.json", longbench_config)
    lengths = _longbench_table("dataset2maxlen.json", longbench_config)
    for name in rest:
        base = name.removesuffix("_e")
        if base not in prompts or base not in lengths:
            known = ", ".join([*embedded_tasks(), *prompts, *suites.names()])
            raise ValueError(f"no prompt for dataset {name!r}; known: {known}")
        tasks[name] = Task(name, prompts[base], lengths[base])
    return tasks


def _longbench_table(name: str, folder: str | Path | None) -> dict[str, Any]:
    path = Path(folder) / name if folder is not None else _fetched_config(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --longbench-config takes the config/ folder of LongBench")
    return json.loads(path.read_text(encoding="utf-8"))


def _fetched_config(name: str) -> Path:
    """Fetches one of LongBench's config files on first use; its sha256 must be the published one."""
    from urllib.error import URLError
    from urllib.request import urlopen

    path = files.cache_dir() / "longbench" / name
    with files.exclusive(f"longbench-{name}"):
        if path.is_file() and files.sha256(path.read_bytes()) == CONFIG_SHA256[name]:
            return path
        try:
            with urlopen(CONFIG_URL + name, timeout=30) as response:
                data = response.read()
        except URLError as error:
            raise OSError(
                f"cannot fetch {CONFIG_URL + name} ({error}); pass longbench_config (--longbench-config DIR), "
                "the config/ folder of a LongBench checkout"
            ) from error
        if files.sha256(data) != CONFIG_SHA256[name]:
            raise ValueError(f"{CONFIG_URL + name} has another sha256 than {CONFIG_SHA256[name]}; not using it")
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

    suite = suites.find(dataset)
    if suite is not None:
        rows = suite.build(suites.Source(None if data_dir is None else Path(data_dir), reader), options or {})
    elif data_dir is not None:
        if options:
            raise ValueError(f"{dataset} is read from {data_dir} and takes no options, found {', '.join(options)}")
        rows = read_jsonl(Path(data_dir) / f"{dataset}.jsonl")
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
    """Reads one JSON object a line; the error for a bad line names file and line."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; the folder holds: {', '.join(_stems(path.parent)) or 'nothing'}"
        )
    with path.open(encoding="utf-8") as file:
        return _parse_lines(file, str(path))


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.jsonl"))


def _parse_lines(lines: Iterable[str], source: str) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}:{number} is not JSON: {error}") from error
    return rows


def _hub_rows(dataset: str) -> list[Row]:
    """Reads a task from the hub's archive.

    The dataset repository is a loading script around ``data.zip``, and ``datasets`` 4 and later run no scripts; its
    rows are these files, unchanged.
    """
    base = dataset.removesuffix("_e")
    if base not in LONGBENCH_TASKS:
        from asymkv.longbench import suites

        known = ", ".join([*embedded_tasks(), *LONGBENCH_TASKS, *suites.names()])
        raise ValueError(f"unknown dataset {dataset!r}; known without --data-dir: {known}")
    from huggingface_hub import hf_hub_download

    archive = hf_hub_download(HUB_DATASET, "data.zip", repo_type="dataset")
    with zipfile.ZipFile(archive) as zipped, zipped.open(f"data/{dataset}.jsonl") as file:
        return _parse_lines(io.TextIOWrapper(file, encoding="utf-8"), f"{archive}:data/{dataset}.jsonl")


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
