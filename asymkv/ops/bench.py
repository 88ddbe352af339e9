"""Timings of the ops against what others do; a benchmark reports, it does not assert.

8 KV heads with a query group of 4 and head size 128, as in Llama-3-8B.
"""

from __future__ import annotations

import copy
import csv
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymkv.budgets import capacity_for
from asymkv.files import csv_text, write_atomic
from asymkv.ops.backends import BACKENDS, Problem
from asymkv.plan import CompactionPlan, contract_pairs, execute, keep_rows
from asymkv.storage import RaggedStorage
from asymkv.view import RowView

KV_HEADS, GROUP, DIM = 8, 4, 128
SCALE = DIM**-0.5
# Share of the mean length that each head of a skewed layer has.
SKEW = (0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 1.8, 2.4)
SHAPES = {"even": (1.0,) * KV_HEADS, "skewed": SKEW}
PLAIN, PADDED, READING = " without cardinality", "sdpa on padded heads", "reading the bytes once (sum)"


CPU_BYTES = 6 * 2**30


@dataclass(frozen=True)
class Options:
    """What is timed.

    Args:
        device: where.
        dtypes: names of torch dtypes.
        rows: per KV head.
        batches: sequences; each has its own heads.
        repeats: timed calls, of which the median counts.
        max_bytes: ways that hold more are skipped, and said to be; None = no limit.
    """

    device: torch.device
    dtypes: Sequence[str]
    rows: Sequence[int]
    batches: Sequence[int] = (1,)
    repeats: int = 15
    max_bytes: int | None = None


class Table:
    """Rows of a csv file, written as they come.

    Args:
        path: of the file; what is in it is not measured again.
        absent: columns that a file of an earlier version lacks, with what its rows stand for.
        stamp: further columns of every row measured from here on, such as the commit.

    Raises:
        ValueError: for a file whose rows lack other columns than those, when a row is looked for.
    """

    def __init__(
        self, path: Path, absent: dict[str, str] | None = None, stamp: dict[str, str] | None = None
    ) -> None:
        self.path = path
        self.stamp = stamp or {}
        self.rows: list[dict[str, str]] = []
        self.skipped: list[str] = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self.rows = list(csv.DictReader(file))
            lacking = {k: v for k, v in (absent or {}).items() if self.rows and k not in self.rows[0]}
            if lacking:
                self.rows = [{**row, **lacking} for row in self.rows]
                self._save()  # now: what it stands for may be known only until the next run

    def find(self, keys: dict[str, Any]) -> dict[str, str] | None:
        """The row with these values, compared as text."""
        lacking = [name for name in keys if self.rows and name not in self.rows[0]]
        if lacking:
            raise ValueError(f"{self.path} is of an earlier version and lacks the columns {lacking}; add them, or "
                             "write to another folder")
        return next((r for r in self.rows if all(r[name] == str(value) for name, value in keys.items())), None)

    def has(self, keys: dict[str, Any]) -> bool:
        """Whether a row with these values is there."""
        return self.find(keys) is not None

    def add(self, keys: dict[str, Any], measure: Callable[[], float | dict[str, str]]) -> None:
        """Measures a row unless it is there: milliseconds, or a value for each of several columns."""
        if self.has(keys):
            return
        found = measure()
        values = found if isinstance(found, dict) else {"ms": f"{found:.4f}"}
        self.rows.append({**{name: str(value) for name, value in keys.items()}, **values, **self.stamp})
        self._save()

    def _save(self) -> None:
        write_atomic(self.path, csv_text(self.rows))

    def skip(self, keys: dict[str, Any], why: str) -> None:
        """Notes that a row is not measured, for the report and the conditions."""
        self.skipped.append(f"{self.path.stem}, {', '.join(str(v) for v in keys.values())}: {why}")

    def markdown(self) -> str:
        """All rows as a markdown table."""
        if not self.rows:
            return ""
        names = list(self.rows[0])
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(row.values()) + " |" for row in self.rows]
        return "\n".join([f"\n## {self.path.stem}", "", *lines])


def default_max_bytes(device: torch.device) -> int:
    """What a cell may hold by default: 6 GiB on a host, half of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else CPU_BYTES


def integers(text: str) -> list[int]:
    """``"1,8,32"`` as numbers.

    Raises:
        ValueError: for anything else.
    """
    return [int(part) for part in text.split(",")]


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) * 1e3

    for _ in range(2):
        once()
    return statistics.median(once() for _ in range(repeats))


def storage_of(lengths: list[int], dtype: torch.dtype, device: torch.device, *, spare: int = 64) -> RaggedStorage:
    """Random rows; capacities are equal where the lengths are."""
    columns = {
        "keys": ((DIM,), dtype, 0), "values": ((DIM,), dtype, 0), "cardinality": ((), torch.int32, 1),
        "log_n": ((), torch.float32, 0), "position": ((), torch.int32, 0),
    }  # fmt: skip
    storage = RaggedStorage([n + spare for n in lengths], columns, device)
    for name in ("keys", "values"):
        storage.columns[name].normal_()
    storage.columns["cardinality"].random_(1, 30)
    storage.columns["log_n"].copy_(storage.columns["cardinality"].float().log())
    storage.merged = True
    storage._set_length(list(lengths))
    return storage


def bench_append(table: Table, options: Options) -> None:
    """One token: in place, torch.cat of K and V as DynamicCache does, a copy of the flat cache as AdaKV does."""
    device = options.device
    for name in options.dtypes:
        for n in options.rows:
            dtype = getattr(torch, name)
            storage = storage_of([n] * KV_HEADS, dtype, device, spare=256)
            new = {"keys": torch.randn(KV_HEADS, 1, DIM, device=device).to(dtype)}
            new["values"], new["position"] = new["keys"], torch.full((KV_HEADS, 1), n, device=device).int()

            def ours(storage: RaggedStorage = storage, new: dict = new) -> None:
                storage.append(new, [1] * KV_HEADS)

            dense = [storage.columns[c].view(1, KV_HEADS, -1, DIM)[:, :, :n].contiguous() for c in ("keys", "values")]

            def cat(dense: list[Tensor] = dense, new: dict = new) -> list[Tensor]:
                return [torch.cat([x, new["keys"][None]], dim=-2) for x in dense]

            def copy(dense: list[Tensor] = dense, new: dict = new) -> list[Tensor]:
                parts = [[y for h in range(KV_HEADS) for y in (x[0, h], new["keys"][h])] for x in dense]
                return [torch.cat(flat) for flat in parts]

            ways = {"asymkv": ours, "torch.cat (DynamicCache)": cat, "copy of all heads (AdaKV)": copy}
            for way, call in ways.items():
                keys = {"dtype": name, "rows": n, "way": way}
                table.add(keys, lambda call=call: milliseconds(call, device, options.repeats))  # type: ignore[misc]


class DecodeCell:
    """Decode attention of one token over one shape of heads, and the ways to compute it that run here.

    Args:
        dtype: name of the rows' dtype.
        batch: sequences.
        rows: per KV head, in the mean.
        heads: a key of ``SHAPES``.
        device: where.
    """

    def __init__(self, dtype: str, batch: int, rows: int, heads: str, device: torch.device) -> None:
        self.keys = {"dtype": dtype, "batch": batch, "rows": rows, "heads": heads}
        self.dtype, self.device = getattr(torch, dtype), device
        self.batch = batch
        self.lengths = [int(rows * share) for share in SHAPES[heads]] * batch
        backends = [b for b, x in BACKENDS.items() if x.missing(device, DIM, self.dtype) is None and b != "reference"]
        backends = [b for b in backends if b != "triton" or device.type == "cuda"]  # not in the interpreter
        self.backends = {b if heads == "even" or b != "sdpa" else "sdpa head by head": b for b in backends}
        self.bytes = sum(self.lengths) * DIM * 2 * self.dtype.itemsize

    def ways(self) -> dict[str, int]:
        """Every way, with the bytes of K and V that it holds."""
        ways = {name + suffix: self.bytes for name in self.backends for suffix in ("", PLAIN)}
        if self.keys["heads"] == "skewed":
            ways[PADDED] = self.bytes + max(self.lengths) * len(self.lengths) * DIM * 2 * self.dtype.itemsize
        return {**ways, READING: 2 * self.bytes}

    def calls(self, ways: Sequence[str]) -> Iterator[tuple[str, Callable[[], object]]]:
        """The calls of some ways, one after the other; what a call alone holds is freed before the next."""
        storage = storage_of(self.lengths, self.dtype, self.device)
        query = torch.randn(self.batch, KV_HEADS * GROUP, 1, DIM, device=self.device).to(self.dtype)
        for way in ways:
            if way == READING:
                yield way, torch.empty(self.bytes // 4, dtype=torch.float32, device=self.device).normal_().sum
                continue
            backend = "sdpa" if way == PADDED else self.backends[way.removesuffix(PLAIN)]
            stored = _padded(storage) if way == PADDED else _single(storage) if way.endswith(PLAIN) else storage
            problem = Problem(query, stored, None, None, SCALE)
            yield way, functools.partial(BACKENDS[backend].attend, problem)


def bench_decode(table: Table, options: Options) -> None:
    """One query a head group over even and skewed heads, with and without cardinalities: every backend here."""
    for dtype, batch, n, heads in product(options.dtypes, options.batches, options.rows, SHAPES):
        cell = DecodeCell(dtype, batch, n, heads, options.device)
        missing = {w: size for w, size in cell.ways().items() if not table.has({**cell.keys, "way": w})}
        wanted = [w for w, size in missing.items() if options.max_bytes is None or size <= options.max_bytes]
        for way in missing.keys() - set(wanted):
            table.skip({**cell.keys, "way": way}, f"{missing[way] / 2**30:.1f} GiB")
        if wanted:
            for way, call in cell.calls(wanted):
                table.add({**cell.keys, "way": way},
                          functools.partial(milliseconds, call, options.device, options.repeats))  # fmt: skip


def _single(rows: RaggedStorage) -> RaggedStorage:
    """The same keys and values, every row a single token: attention without cardinalities."""
    single = copy.copy(rows)
    single.columns = {**rows.columns, "cardinality": torch.ones_like(rows.columns["cardinality"]),
                      "log_n": torch.zeros_like(rows.columns["log_n"])}  # fmt: skip
    single.merged, single._segments = False, None
    return single


def _padded(rows: RaggedStorage) -> RaggedStorage:
    """The same rows with every head padded to the widest, so that dense attention needs no copy."""
    wide = rows.like([max(rows.length)] * rows.heads)
    wide._set_length(list(rows.length))
    wide.merged = True
    for name, column in wide.columns.items():
        column.copy_(rows.dense(name).flatten(0, 1))
    return wide


class _Frequencies:
    """What compaction asks of a rotary embedding."""

    def __init__(self, device: torch.device) -> None:
        self.inv_freq = 500_000.0 ** -(torch.arange(DIM // 2, device=device) / (DIM // 2)).float()

    def frequencies(self, device: torch.device, size: int) -> Tensor:
        return self.inv_freq


def bench_compaction(table: Table, options: Options) -> None:
    """2,560 rows of 8 heads down to 2,048: AsymKV's merges, drops, and gather + cat in PyTorch for the drops."""
    before, after = 2560, 2048
    device = options.device
    for name in options.dtypes:
        storage = storage_of([before] * KV_HEADS, getattr(torch, name), device, spare=capacity_for(before) - before)
        position = torch.arange(before, device=device).expand(1, KV_HEADS, -1).int()
        storage.write("position", position[0])
        dense = {c: storage.dense(c)[None] for c in storage.columns}
        order = torch.rand(1, KV_HEADS, before - 1, device=device)
        pairs = order <= order.kthvalue(before - after, dim=-1, keepdim=True).values
        keep = torch.nn.functional.pad(~pairs, (1, 0), value=True)
        lengths = torch.full((1, KV_HEADS), before, device=device)
        view = RowView(
            keys=dense["keys"], values=dense["values"], cardinality=dense["cardinality"], positions=dense["position"],
            rotary_positions=position.long(), valid=torch.ones_like(position, dtype=torch.bool), lengths=lengths,
            budget=lengths, tokens=lengths[0], prompt=True, scale=SCALE, rope=_Frequencies(device),  # type: ignore[arg-type]
        )  # fmt: skip
        weight = torch.rand(1, KV_HEADS, before, DIM, device=device)
        index = keep[0].nonzero(as_tuple=True)[1].view(KV_HEADS, after)

        def gather_cat(storage: RaggedStorage = storage, index: Tensor = index) -> list[Tensor]:
            out = []
            for column in storage.columns:
                rows = storage.dense(column)
                wide = index.view(*index.shape, *(1,) * (rows.ndim - 2)).expand(-1, -1, *rows.shape[2:])
                kept = rows.gather(1, wide)
                out.append(torch.cat([kept, rows[:, : capacity_for(after) - after]], dim=1))
            return out

        plans = {
            "merge, weights per dimension": CompactionPlan(contract_pairs(pairs), weight),
            "merge by cardinality": CompactionPlan(contract_pairs(pairs)), "drop": keep_rows(keep),
        }  # fmt: skip
        ways: dict[str, Callable] = {
            f"asymkv, {way}": lambda plan=plan, view=view, storage=storage: execute(plan, view, storage, "original")
            for way, plan in plans.items()
        } | {"gather + cat in PyTorch, drop": gather_cat}
        for way, call in ways.items():
            keys = {"dtype": name, "rows": before, "way": way}
            table.add(keys, lambda call=call: milliseconds(call, device, options.repeats))  # type: ignore[misc]


TABLES = {"append": bench_append, "decode": bench_decode, "compaction": bench_compaction}


def plot(folder: Path) -> None:
    """``ops.png``: time against rows of append and of decode at the first batch size, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in ("append", "decode") if (folder / f"{n}.csv").exists()]
    figure, axes = plt.subplots(1, max(len(names), 1), figsize=(7 * max(len(names), 1), 5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        series: dict[str, list[tuple[int, float]]] = {}
        rows = Table(folder / f"{name}.csv").rows
        first = rows[0].get("batch") if rows else None
        for row in rows:
            if row.get("batch") != first or row["way"].endswith(PLAIN):
                continue  # what can be told apart in one figure; the table has the rest
            label = ", ".join(v for k, v in row.items() if k not in ("rows", "ms", "batch", "commit"))
            series.setdefault(label, []).append((int(row["rows"]), float(row["ms"])))
        for label, points in series.items():
            axis.loglog(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set(title=name, xlabel="rows per KV head", ylabel="ms")
        axis.legend(fontsize=6)
    figure.savefig(folder / "ops.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
