"""Timings of the ops against what others do; a benchmark reports, it does not assert.

8 KV heads with a query group of 4 and head size 128, as in Llama-3-8B.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from asymkv.budgets import capacity_for
from asymkv.ops.backends import BACKENDS, Problem
from asymkv.plan import CompactionPlan, contract_pairs, execute, keep_rows
from asymkv.storage import RaggedStorage
from asymkv.view import RowView

KV_HEADS, GROUP, DIM = 8, 4, 128
SCALE = DIM**-0.5
# Share of the mean length that each head of a skewed layer has.
SKEW = (0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 1.8, 2.4)


class Table:
    """Rows of a csv file, written as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict] = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self.rows = list(csv.DictReader(file))

    def add(self, keys: dict, measure: Callable[[], float]) -> None:
        """Times a row unless it is there."""
        keys = {name: str(value) for name, value in keys.items()}
        if any(all(row[name] == value for name, value in keys.items()) for row in self.rows):
            return
        self.rows.append({**keys, "ms": f"{measure():.4f}"})
        with self.path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

    def markdown(self) -> str:
        """All rows as a markdown table."""
        if not self.rows:
            return ""
        names = list(self.rows[0])
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(row.values()) + " |" for row in self.rows]
        return "\n".join([f"\n## {self.path.stem}", "", *lines])


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


def bench_append(
    table: Table, device: torch.device, dtypes: Sequence[str], rows: Sequence[int], repeats: int
) -> None:
    """One token: in place, torch.cat of K and V as DynamicCache does, a copy of the flat cache as AdaKV does."""
    for name in dtypes:
        for n in rows:
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
                table.add(keys, lambda call=call: milliseconds(call, device, repeats))  # type: ignore[misc]


def bench_decode(
    table: Table, device: torch.device, dtypes: Sequence[str], rows: Sequence[int], repeats: int
) -> None:
    """One query a head group over even and skewed heads, with cardinalities: every backend that runs here."""
    for name in dtypes:
        dtype = getattr(torch, name)
        able = [b for b, x in BACKENDS.items() if x.missing(device, DIM, dtype) is None and b != "reference"]
        able = [b for b in able if b != "triton" or device.type == "cuda"]  # not in the interpreter
        for n in rows:
            for heads, lengths in {"even": [n] * KV_HEADS, "skewed": [int(n * s) for s in SKEW]}.items():
                storage = storage_of(lengths, dtype, device)
                query = torch.randn(1, KV_HEADS * GROUP, 1, DIM, device=device).to(dtype)
                ways = {b if heads == "even" or b != "sdpa" else "sdpa head by head": (b, storage) for b in able}
                if heads == "skewed":
                    ways["sdpa on padded heads"] = ("sdpa", _padded(storage))
                for way, (backend, stored) in ways.items():
                    keys = {"dtype": name, "rows": n, "heads": heads, "way": way}
                    problem = Problem(query, stored, None, None, SCALE)
                    call = lambda b=backend, p=problem: BACKENDS[b].attend(p)  # noqa: E731
                    table.add(keys, lambda call=call: milliseconds(call, device, repeats))  # type: ignore[misc]
                size = sum(lengths) * DIM * 2 * dtype.itemsize
                source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
                keys = {"dtype": name, "rows": n, "heads": heads, "way": "reading the bytes once (sum)"}
                table.add(keys, lambda source=source: milliseconds(source.sum, device, repeats))  # type: ignore[misc]


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

    def frequencies(self, device: torch.device) -> Tensor:
        return self.inv_freq


def bench_compaction(
    table: Table, device: torch.device, dtypes: Sequence[str], rows: Sequence[int], repeats: int
) -> None:
    """2,560 rows of 8 heads down to 2,048: AsymKV's merges, drops, and gather + cat in PyTorch for the drops."""
    before, after = 2560, 2048
    for name in dtypes:
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
            table.add(keys, lambda call=call: milliseconds(call, device, repeats))  # type: ignore[misc]


TABLES = {"append": bench_append, "decode": bench_decode, "compaction": bench_compaction}


def plot(folder: Path) -> None:
    """``ops.png``: time against rows of append and decode, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in ("append", "decode") if (folder / f"{n}.csv").exists()]
    figure, axes = plt.subplots(1, max(len(names), 1), figsize=(7 * max(len(names), 1), 5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        series: dict[str, list[tuple[int, float]]] = {}
        for row in Table(folder / f"{name}.csv").rows:
            label = ", ".join(v for k, v in row.items() if k not in ("rows", "ms"))
            series.setdefault(label, []).append((int(row["rows"]), float(row["ms"])))
        for label, points in series.items():
            axis.loglog(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set(title=name, xlabel="rows per KV head", ylabel="ms")
        axis.legend(fontsize=6)
    figure.savefig(folder / "ops.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
