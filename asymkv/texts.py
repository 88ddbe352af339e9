"""Documents by name: local files, and data sets of the hub in every way that the scripts let them be written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from asymkv.longbench.jsonl import numbered_objects, shown

SUFFIXES = (".txt", ".md", ".jsonl")
# Names without an owner, of which a slash parts the configuration; with that of the public code where it gives none.
KNOWN = {"wikitext": ("Salesforce/wikitext", None), "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0")}
FORMS = "owner/name, owner/name:configuration, name:configuration, " + ", ".join(f"{n}/configuration" for n in KNOWN)


def read_text(path: str | Path) -> str:
    """The content of a text file.

    Raises:
        ValueError: for a file that is missing or not UTF-8; names it.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"no text file at {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


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
        content = read_text(path)
        if path.suffix != ".jsonl":
            yield content
            continue
        for place, row in numbered_objects(content.encode(), str(path)):
            if not isinstance(row.get("text"), str):
                raise ValueError(f"{place}: expected an object with \"text\"; found {shown(row)}")
            yield row["text"]


def samples_of(text: str, tokenizer: Any, tokens: int, count: int) -> list[Tensor]:
    """The first ``count`` samples of a text, token ids ``[tokens]`` each; a shorter one of a shorter text."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return [sample for sample in ids.split(tokens)[:count] if len(sample) >= min(tokens, len(ids))]


def split_name(name: str, configuration: str | None = None) -> tuple[str, str | None]:
    """A data set's id on the hub, and its configuration.

    Args:
        name: see ``FORMS``; ``wikitext-103-v1`` and the like are configurations of WikiText.
        configuration: given apart from the name.

    Raises:
        ValueError: for a name of another form, or two configurations.
    """
    path, _, own = name.partition(":")
    owner, _, rest = path.partition("/")
    if not own and (owner in KNOWN and rest or "/" in rest):
        path, own = path.rsplit("/", 1)
    if not own and path.startswith("wikitext-"):
        path, own = "wikitext", path
    if not path or path.count("/") > 1:
        raise ValueError(f"a data set is named {FORMS}; found {name!r}")
    if own and configuration is not None and configuration != own:
        raise ValueError(f"data set {name!r} names configuration {own!r}; found {configuration!r} beside it")
    found, default = KNOWN.get(path, (path, None))
    return found, own or configuration or default


def load_split(name: str, split: str, *, configuration: str | None = None, cache_dir: str | None = None) -> Any:
    """Rows of a data set of the hub; ``name`` as in :func:`split_name`.

    Raises:
        ImportError: if ``datasets`` is not installed.
        ValueError: for a data set that cannot be had.
    """
    # A folder is a data set too, if it holds files that the library knows.
    path, own = (name, configuration) if Path(name).is_dir() else split_name(name, configuration)
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"{name!r} is no local file or folder of text; as a data set of the hub it needs the "
                          "package: pip install datasets") from None
    try:
        return load_dataset(path, own, split=split, cache_dir=cache_dir)
    except Exception as error:  # whatever hub, network or files raise
        raise ValueError(f"{name!r} is no local file or folder of text, and the data set {path!r} (configuration "
                         f"{own!r}, split {split!r}) cannot be had: {type(error).__name__}: {error}") from error


def documents(rows: Sequence[str], name: str) -> Iterator[str]:
    """Documents of a data set's column "text": its rows, but for WikiText, whose rows are lines.

    Args:
        rows: the column.
        name: of the data set, as in :func:`split_name`.
    """
    if Path(name).is_dir() or split_name(name)[0] != KNOWN["wikitext"][0]:
        yield from rows
        return
    document: list[str] = []
    for line in rows:
        # An article opens with " = Title = ", a section with " = = Title = = ".
        if line.startswith(" = ") and not line.startswith(" = = ") and line.rstrip().endswith(" =") and document:
            yield "".join(document)
            document = []
        document.append(line)
    if document:
        yield "".join(document)


def text_column(rows: Any, name: str) -> Sequence[str]:
    """The column "text" of a data set's rows; raises ValueError where there is none."""
    if "text" not in rows.column_names:
        raise ValueError(f"data set {name!r} has no column 'text'; found {rows.column_names}")
    return rows["text"]
