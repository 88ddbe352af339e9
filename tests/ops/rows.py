"""Random flattened rows for the op tests, and the table of cases that every op is run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asymkv.ops import reference

HEAD_LENS = [[1], [0, 3], [5, 1, 130, 7]]
DIMS = [64, 80, 96, 128, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative error that the dtype's own rounding allows, of results computed in fp32.
RTOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
CANARY = 77


@dataclass
class Rows:
    """A flat buffer with spare rows behind each head, and canary rows around and between the runs."""

    keys: Tensor
    values: Tensor
    cardinality: Tensor
    log_n: Tensor
    position: Tensor
    length: Tensor
    start: Tensor
    capacity: Tensor

    def columns(self) -> list[Tensor]:
        return [self.keys, self.values, self.cardinality, self.log_n, self.position]

    def clone(self) -> Rows:
        return Rows(*(x.clone() for x in vars(self).values()))

    def to(self, device) -> Rows:
        return Rows(*(x.to(device) for x in vars(self).values()))

    def outside(self) -> Tensor:
        """Flat rows that belong to no head."""
        free = torch.ones(len(self.keys), dtype=torch.bool)
        for first, room in zip(self.start.tolist(), self.capacity.tolist(), strict=True):
            free[first : first + room] = False
        return free


def make_rows(head_lens, dim, dtype, *, spare=4, most=10_000, seed=0) -> Rows:
    g = torch.Generator().manual_seed(seed)
    capacity = torch.tensor([n + spare for n in head_lens], dtype=torch.int64)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), (capacity + 3).cumsum(0)])[: len(head_lens)] + 2
    total = int((start + capacity)[-1]) + 2 if head_lens else 4
    keys, values = (torch.randn(total, dim, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    single = torch.rand(total, generator=g) < 0.5
    cardinality = torch.where(single, 1, torch.rand(total, generator=g) * most).clamp(min=1).int()
    position = torch.full((total,), CANARY, dtype=torch.int32)
    for first, n in zip(start.tolist(), head_lens, strict=True):
        position[first : first + n] = torch.arange(n, dtype=torch.int32) * 3 + 1
    rows = Rows(keys, values, cardinality, cardinality.float().log(), position,
                torch.tensor(head_lens, dtype=torch.int64), start, capacity)  # fmt: skip
    free = rows.outside()
    rows.keys[free], rows.values[free], rows.cardinality[free], rows.log_n[free] = CANARY, CANARY, CANARY, CANARY
    return rows


def columns(rows, group, queries, dim, dtype, *, heads=2, seed=0):
    """Arguments of attention_mass and key_curvature: some rows absent, some queries absent, lse over what is seen."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(heads, rows + 5, dim, generator=g).to(dtype)[:, :rows] for _ in range(2))
    query = torch.randn(heads, group, queries, dim, generator=g).to(dtype)
    log_n = torch.randint(1, 10_000, (heads, rows), generator=g).float().log()
    log_n[1, rows // 2 :] = -torch.inf
    position = torch.arange(rows, dtype=torch.int32).expand(heads, -1).contiguous()
    at = torch.randint(-1, rows + 4, (heads, queries), generator=g)
    bias = torch.where(position[:, None] > at[..., None], -torch.inf, log_n[:, None].double())
    out, lse = reference.biased_attention(query.double(), k.double()[:, None], v.double()[:, None], bias[:, None],
                                          dim**-0.5)  # fmt: skip
    return [query, k, v, log_n, position, at, lse.float(), out.to(dtype), dim**-0.5]
