"""Compiles every Triton launch for an NVIDIA GPU, on a machine that needs none.

    python -m asymkv.ops._triton_check [--only "128-bfloat16-*" "80-*-decode"] [--arch 90]

One JSON line per kernel: what it is, shared memory in bytes, and whether its loads from the buffers are 16 bytes wide.
A problem is named by head dimension, dtype, and what is computed.
Launches come from the functions that the launchers use, on tensors without memory.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from asymkv.ops.triton_attention import attend_launches
from asymkv.ops.triton_launch import DIMS, DTYPES, Launch
from asymkv.ops.triton_statistics import curvature_launch, mass_launch

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes a program may use, by compute capability (CUDA guide, table 30)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention_problems(dim: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Launch]]]:
    """Decode with and without cardinality, a short and a long chunk with positions."""
    batch, kv_heads, group, rows = 8, 8, 4, 8192
    count = batch * kv_heads
    keys = meta(count * rows, dim, dtype=dtype)
    start = meta(count, dtype=torch.int64)
    position = meta(count * rows, dtype=torch.int32)
    for name, queries, with_n, splits in (("decode", 1, True, 16), ("decode-without-n", 1, False, 1),
                                          ("few-queries", 12, True, 8), ("chunk", 512, True, 1)):  # fmt: skip
        query = meta(batch, queries, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
        at = None if queries == 1 else meta(batch, queries, dtype=torch.int64)
        out, lse = meta(*query.shape, dtype=dtype), meta(*query.shape[:3])
        log_n = meta(count * rows) if with_n else None
        yield name, attend_launches(query, keys, keys, log_n, position, at, start, start, out, lse, dim**-0.5, rows,
                                    splits, False)


def statistics_problems(dim: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Launch]]]:
    """A chunk of queries over views into longer buffers."""
    heads, group, queries, rows = 8, 4, 512, 8192
    query = meta(heads, group, queries, dim, dtype=dtype)
    keys = meta(heads, 2 * rows, dim, dtype=dtype)[:, :rows]
    log_n, position = (meta(heads, 2 * rows, dtype=t)[:, :rows] for t in (torch.float32, torch.int32))
    at, lse = meta(heads, queries, dtype=torch.int64), meta(heads, group, queries)
    mass = meta(heads, group, rows)
    square, product = meta(heads, rows, dim), meta(heads, rows, dim // 2)
    tables = (log_n, position, at, lse)
    yield "mass", [mass_launch(query, keys, *tables, mass, dim**-0.5, False)]
    yield "curvature", [curvature_launch(query, keys, keys, *tables, query, square, product, dim**-0.5, False)]


class OfflineDriver:
    """Stands for a device that is not there, so that launches take their usual path up to the compiler."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def compile_launch(launch: Launch) -> Any:
    """The compiled kernel, specialised as a real launch with these arguments would be."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return launch.function().warmup(*launch.args, grid=launch.grid, **launch.constants, **options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of problems")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 = H100 and H200")
    args = parser.parse_args()
    from triton.runtime.driver import driver

    driver.set_active(OfflineDriver(args.arch))
    done: set[str] = set()
    for name, launches in problems():
        for launch in launches if any(fnmatch.fnmatch(name, pattern) for pattern in args.only) else []:
            compiled = compile_launch(launch)
            if compiled.hash not in done:
                report(compiled, name, launch, SHARED_LIMIT.get(args.arch))
                done.add(compiled.hash)
    return 0


def problems() -> Iterator[tuple[str, list[Launch]]]:
    """Every launch of the library, by the name of its problem."""
    for dim, dtype in itertools.product(DIMS, DTYPES):
        for name, launches in (*attention_problems(dim, dtype), *statistics_problems(dim, dtype)):
            yield f"{dim}-{str(dtype).removeprefix('torch.')}-{name}", launches


def report(compiled: Any, name: str, launch: Launch, limit: int | None) -> None:
    """Prints what the compiler made of a launch."""
    ptx = compiled.asm["ptx"]
    found = {
        "kernel": launch.kernel,
        "problem": name,
        "shared": compiled.metadata.shared,
        "fits": limit is None or compiled.metadata.shared <= limit,
        "wide": "cp.async.cg.shared.global" in ptx or ".v4.b32" in ptx,
        "async": ptx.count("cp.async.cg.shared.global"),
        "mma": "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "fma",
    }
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
