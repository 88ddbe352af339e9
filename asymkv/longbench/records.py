"""A folder of measured records that several processes may fill, that survives a kill, and that holds one setting only.

Each process appends to its own ``records-<shard>.jsonl`` and describes itself in ``run-<shard>.json``; a reader merges
all of them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import IO, Any

from asymkv.longbench.files import write_atomic
from asymkv.longbench.jsonl import check_finite, parse_object, read_object

try:
    import fcntl
except ImportError:  # Windows: nothing tells two runs of one folder apart there
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]
# Files of records that this process has claimed, by path; the lock is the system's, so that it dies with the process.
_claimed: dict[Path, IO[bytes]] = {}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count`` equal parts of the work."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads ``i/n``, i from 0."""
        try:
            index, count = (int(part) for part in text.split("/"))
        except ValueError:
            raise ValueError(f"a shard is written i/n, found {text!r}") from None
        if not 0 <= index < count:
            raise ValueError(f"shard {text!r}: i must be from 0 to n - 1")
        return cls(index, count)

    @property
    def label(self) -> str:
        """For file names."""
        return f"{self.index}of{self.count}"


class RecordFolder:
    """Appends records, knows which exist, and refuses settings other than the folder's own.

    Args:
        folder: created if absent.
        key: identifies a record; of two with the same key the first is kept.
        shard: whose files this process writes.
        worker: name of a process that measures other arms of the same shard, into files of its own.
    """

    def __init__(
        self, folder: str | Path, key: Callable[[Record], Hashable], shard: Shard | None = None, worker: str = ""
    ) -> None:
        self.folder = Path(folder)
        self.key = key
        label = f"{worker}-" * bool(worker) + (shard or Shard()).label
        self.records_path = self.folder / f"records-{label}.jsonl"
        self.run_path = self.folder / f"run-{label}.json"

    def claim(self, settings: Record, conditions: Record) -> None:
        """Writes this process's ``run-<shard>.json`` and cuts a half-written last line off its records.

        The shard's files are this process's until :meth:`release` or its end.

        Args:
            settings: what the numbers depend on. Every entry that the folder already has must be equal; a None says
                nothing, and the mapping under ``arms`` is compared arm by arm, so that arms may be added later, by an
                experiment of another name too.
            conditions: of this session (machine, versions, date); added to those of earlier ones, not compared.

        Raises:
            ValueError: if the folder holds results of other settings (names them), or if another process holds what
                this one would write.
        """
        self.refuse_other(settings)
        settings = _untold(merged_settings(self.runs()), settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        sessions: list[Record] = []
        if self.run_path.exists():
            earlier = read_object(self.run_path)
            settings, sessions = _merged(earlier["settings"], settings), earlier["sessions"]
        run = {"settings": settings, "sessions": [*sessions, conditions]}
        write_atomic(self.run_path, json.dumps(run, indent=2) + "\n")
        if self.records_path.exists():
            data = self.records_path.read_bytes()
            os.truncate(self.records_path, data.rfind(b"\n") + 1)

    def refuse_other(self, settings: Record) -> None:
        """Raises ValueError with the names of the settings that the folder's results differ in."""
        for run in self.runs():
            differing = sorted(conflicts(run["settings"], settings))
            if differing:
                raise ValueError(f"{self.folder} holds results of other settings: {', '.join(differing)} differ")

    def _lock(self) -> None:
        """Makes sure that no other process writes this shard, or shards of another division of the same work.

        A run that was killed may have left a rank behind, which would measure rows that the next run measures too.
        """
        own = self.records_path.resolve()
        if own not in _claimed:
            _claimed[own] = _locked(own)
        division = f"records-*{own.stem[own.stem.rindex('of') :]}.jsonl"
        for path in set(own.parent.glob("records-*of*.jsonl")) - set(own.parent.glob(division)) - set(_claimed):
            # Several ranks of one run look at the same moment.
            _locked(path, shared=True).close()

    def release(self) -> None:
        """Lets other processes write what this one claimed; without it they may when this process ends."""
        file = _claimed.pop(self.records_path.resolve(), None)
        if file is not None:
            file.close()

    def runs(self) -> list[Record]:
        """The ``run-*.json`` of all processes."""
        return [read_object(path) for path in sorted(self.folder.glob("run-*.json"))]

    def append(self, record: Record) -> None:
        """Adds one record, on disk when this returns; one with NaN or an infinity is refused and nothing written."""
        check_finite(record, f"record {self.key(record)} for {self.records_path}")
        with self.records_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Record]:
        """Records of all processes; what follows a file's last newline is a line still being written.

        Raises:
            ValueError: for a line that is no record; names file and line.
        """
        found: dict[Hashable, Record] = {}
        for path in sorted(self.folder.glob("records-*.jsonl")):
            data = path.read_bytes()
            for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
                record = parse_object(line, f"{path}:{number}")
                try:
                    key = self.key(record)
                except KeyError as error:
                    has = ", ".join(record) or "nothing"
                    raise ValueError(f"{path}:{number}: a record lacks {error.args[0]}; it has {has}") from error
                found.setdefault(key, record)
        return list(found.values())

    def forget(self, arms: Collection[str]) -> int:
        """Takes arms out of the folder, records and settings, so that they can be measured anew or otherwise.

        Returns:
            How many records went.

        Raises:
            ValueError: for an arm that the folder does not hold, or if another process writes to it; nothing is lost.
        """
        # A kill may have left an arm's settings without its records.
        held = {record["arm"] for record in self.read() if "arm" in record}
        held |= set(merged_settings(self.runs()).get("arms", ()))
        missing = sorted(set(arms) - held)
        if missing:
            raise ValueError(
                f"{self.folder} holds nothing of {', '.join(missing)}; it has {', '.join(sorted(held))}"
            )
        with ExitStack() as locks:
            paths = sorted(self.folder.glob("records-*.jsonl"))
            for path in paths:
                locks.enter_context(_locked(path))
            gone = sum(_rewrite_without(path, arms) for path in paths)
            for path in sorted(self.folder.glob("run-*.json")):
                run = read_object(path)
                for name in arms:
                    run["settings"].get("arms", {}).pop(name, None)
                    run["settings"].pop(f"files.{name}", None)
                write_atomic(path, json.dumps(run, indent=2) + "\n")
        return gone

    def done(self) -> set[Hashable]:
        """Keys of all records."""
        return {self.key(record) for record in self.read()}


def _rewrite_without(path: Path, arms: Collection[str]) -> int:
    """Rewrites a file of records without those of some arms; how many these were."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    kept = [line for line in lines if json.loads(line).get("arm") not in arms]
    if len(kept) < len(lines):
        write_atomic(path, "".join(f"{line}\n" for line in kept))
    return len(lines) - len(kept)


def _locked(path: Path, *, shared: bool = False) -> IO[bytes]:
    """The opened file, locked until it is closed; raises where another process holds it."""
    file = path.open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path} is being written by another process; wait for it, or end it") from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): do not start two runs of one folder", path, error)
    return file


def machines(runs: Iterable[Record]) -> set[str]:
    """Names of the devices that a folder was measured on; times of different ones do not compare."""
    return {session["device_name"] for run in runs for session in run["sessions"] if session.get("device_name")}


def merged_settings(runs: Iterable[Record]) -> Record:
    """Settings of a folder: those of all its processes together."""
    total: Record = {}
    for run in runs:
        total = _merged(total, run["settings"])
    return total


def _merged(old: Record, new: Record) -> Record:
    known = {name: value for name, value in new.items() if value is not None}
    return {**new, **old, **known, "arms": {**old.get("arms", {}), **new.get("arms", {})}}


def _untold(old: Record, new: Record) -> Record:
    """New settings without the files of arms that were measured before anyone wrote down which files they read.

    Those may have been others than today's: a folder goes on saying nothing of them.
    """
    measured = {f"files.{name}" for name in old.get("arms", {})} | ({"config.files"} if old else set())
    return {name: None if name in measured and name not in old else value for name, value in new.items()}


def conflicts(old: Record, new: Record) -> Iterator[str]:
    """Names of entries that both settings have, with different values."""
    old, new = _with_options(old), _with_options(new)
    for name in old.keys() & new.keys() - {"arms", "experiment"}:
        if old[name] is not None and new[name] is not None and old[name] != new[name]:
            yield name
    arms, others = old.get("arms", {}), new.get("arms", {})
    yield from (f"arms.{name}" for name in arms.keys() & others.keys() if _said(arms[name]) != _said(others[name]))


def _said(arm: Any) -> Any:
    """An arm's settings without those left open, and with the defaults of its method.

    A later version may know more of a method's options: a folder that does not name one was measured at its default.
    """
    if isinstance(arm, list):
        return [_said(each) for each in arm]
    if not isinstance(arm, dict):
        return arm
    return {name: value for name, value in {**_options(arm.get("method")), **arm}.items() if value is not None}


def _with_options(settings: Record) -> Record:
    """Flat settings of one arm, ``config.<name>``, with the defaults of its method; others as they are."""
    options = _options(settings.get("config.method"))
    return {**{f"config.{name}": "none" if x is None else x for name, x in options.items()}, **settings}


def _options(method: Any) -> Record:
    """A method's own options and their defaults, as json has them; nothing for one that is not ours."""
    from asymkv.methods import METHODS

    found = METHODS.get(str(method))
    options = {f.name: f.default for f in fields(found) if f.init and f.default is not MISSING} if found else {}
    return json.loads(json.dumps(options, default=str))
