"""Argument checks of the ops over flattened rows, in the words and in the order of ``csrc/checks.h``.

Every message begins with the name of the argument, says what it must be, and what was found. Legend: N heads (batch x
KV heads), R rows of a flat buffer, T widest head, t new rows, G query heads of a KV head, Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
INT32_MAX = 2**31 - 1
HALF_TYPES = (torch.float16, torch.bfloat16)
_NAMES = {
    torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16",
    torch.int32: "Int", torch.int64: "Long",
}  # fmt: skip


def check(condition: bool, message: str) -> None:
    """Raises ValueError with ``message`` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_dtype(name: str, x: Tensor, wanted: torch.dtype) -> None:
    """A column has exactly this dtype."""
    check(x.dtype == wanted, f"{name} must be {_NAMES[wanted]}; found {_NAMES.get(x.dtype, x.dtype)}")


def check_float(name: str, x: Tensor, allow_double: bool) -> None:
    """A float type that the ops compute with."""
    allowed = (torch.float32, *HALF_TYPES, *((torch.float64,) if allow_double else ()))
    text = "Float, Half or BFloat16" + (" or Double" if allow_double else "")
    check(x.dtype in allowed, f"{name} must be {text}; found {_NAMES.get(x.dtype, x.dtype)}")


def check_shape(name: str, x: Tensor, sizes: tuple[int, ...]) -> None:
    """Sizes are as given; -1 fits anything."""
    fits = x.ndim == len(sizes) and all(want < 0 or want == have for want, have in zip(sizes, x.shape, strict=True))
    wanted = ", ".join("*" if want < 0 else str(want) for want in sizes)
    check(fits, f"{name} must be [{wanted}]; found {list(x.shape)}")


def check_contiguous(name: str, x: Tensor) -> None:
    """Lies densely in memory."""
    check(x.is_contiguous(), f"{name} must be contiguous")


def check_dense_rows(name: str, x: Tensor) -> None:
    """The last dimension lies densely in memory."""
    check(x.shape[-1] <= 1 or x.stride(-1) == 1,
          f"{name} must be contiguous in its last dimension; found stride {x.stride(-1)}")  # fmt: skip


def check_source(name: str, x: Tensor, dtype: torch.dtype, sizes: tuple[int, ...], keys: Tensor) -> None:
    """A dense column ``[N, T, ...]``; heads may lie apart from each other, a head's rows may not."""
    check_dtype(name, x, dtype)
    check_shape(name, x, sizes)
    check_same_device(name, x, keys)
    dense = 1
    for i in range(x.ndim - 1, 0, -1):
        check(x.shape[i] <= 1 or x.stride(i) == dense, f"{name} must be contiguous within a head")
        dense *= x.shape[i]


def check_head_dim(dim: int) -> None:
    """What the kernels can read in 16-byte pieces and hold."""
    check(dim > 0 and dim % 8 == 0 and dim <= MAX_HEAD_DIM, "keys must have a head dimension that is a multiple of 8, "
          f"at most {MAX_HEAD_DIM}; found {dim}")  # fmt: skip


def check_same_device(name: str, x: Tensor, keys: Tensor) -> None:
    """All tensors of a call lie on one device."""
    check(x.device == keys.device, f"{name} must be on the device of keys")


def check_index(name: str, x: Tensor, heads: int, keys: Tensor) -> None:
    """A table of one int64 a head."""
    check_dtype(name, x, torch.int64)
    check_shape(name, x, (heads,))
    check_contiguous(name, x)
    check_same_device(name, x, keys)


def check_runs(start: Tensor, length: Tensor, capacity: Tensor | None, rows: int) -> None:
    """Ascending runs inside a buffer of ``rows``, none longer than its capacity."""
    room = length if capacity is None else capacity
    end = 0
    for h, (first, n, c) in enumerate(zip(start.tolist(), length.tolist(), room.tolist(), strict=True)):
        check(n >= 0, f"length must be >= 0; head {h} has {n}")
        check(c >= n, f"capacity must be at least length; head {h} has {c} and {n}")
        check(first >= end, "start must be ascending, runs apart from each other; "
              f"head {h} starts at {first}, free from {end}")  # fmt: skip
        name = "length" if capacity is None else "capacity"
        check(c <= rows - first, f"{name} must end inside keys ({rows} rows); head {h} starts at {first} with {c}")
        end = first + c


def check_columns(
    keys: Tensor, values: Tensor, cardinality: Tensor, log_n: Tensor, position: Tensor, prefix: str = ""
) -> None:
    """The columns of a flat buffer; ``prefix`` goes before their names."""
    check_float(f"{prefix}keys", keys, True)
    check_shape(f"{prefix}keys", keys, (-1, -1))
    check_head_dim(keys.shape[1])
    rows = keys.shape[0]
    check_dtype(f"{prefix}values", values, keys.dtype)
    check_shape(f"{prefix}values", values, (rows, -1))
    columns = {"cardinality": (cardinality, torch.int32), "log_n": (log_n, torch.float32),
               "position": (position, torch.int32)}  # fmt: skip
    for name, (x, dtype) in columns.items():
        check_dtype(prefix + name, x, dtype)
        check_shape(prefix + name, x, (rows,))
    everything = {"keys": keys, "values": values, **{name: x for name, (x, _) in columns.items()}}
    for name, x in everything.items():
        check_contiguous(prefix + name, x)
    for name, x in everything.items():
        check_same_device(prefix + name, x, keys)


def check_append(
    keys: Tensor, values: Tensor, cardinality: Tensor, log_n: Tensor, position: Tensor, length: Tensor, start: Tensor,
    capacity: Tensor, new_keys: Tensor, new_values: Tensor, new_position: Tensor,
    new_cardinality: Tensor | None = None, counts: Tensor | None = None,
) -> None:  # fmt: skip
    """Shapes and types of ``ragged_append_``."""
    check_columns(keys, values, cardinality, log_n, position)
    check(length.ndim == 1, f"length must be [N]; found {list(length.shape)}")
    heads = length.shape[0]
    for name, x in (("length", length), ("start", start), ("capacity", capacity)):
        check_index(name, x, heads, keys)
    check(new_keys.ndim == 3, f"new_keys must be [N, t, D]; found {list(new_keys.shape)}")
    new = new_keys.shape[1]
    for name, x, width in (("new_keys", new_keys, keys.shape[1]), ("new_values", new_values, values.shape[1])):
        check_dtype(name, x, keys.dtype)
        check_shape(name, x, (heads, new, width))
        check_dense_rows(name, x)
    check_dtype("new_position", new_position, torch.int32)
    check_shape("new_position", new_position, (heads, new))
    for name, x in (("new_keys", new_keys), ("new_values", new_values), ("new_position", new_position)):
        check_same_device(name, x, keys)
    if new_cardinality is not None:
        check_dtype("new_cardinality", new_cardinality, torch.int32)
        check_shape("new_cardinality", new_cardinality, (heads, new))
        check_same_device("new_cardinality", new_cardinality, keys)
    if counts is not None:
        check_index("counts", counts, heads, keys)


def check_layout(destination: Tensor, length: Tensor) -> None:
    """Shapes and types of ``compaction_layout``."""
    check_dtype("destination", destination, torch.int64)
    check_shape("destination", destination, (-1, -1))
    check_contiguous("destination", destination)
    check_index("length", length, destination.shape[0], destination)


def check_compact(
    keys: Tensor, values: Tensor, cardinality: Tensor, position: Tensor, rotary: Tensor, statistics: list[Tensor],
    key_weight: Tensor | None, order: Tensor, offset: Tensor, inv_freq: Tensor, target_rotary: Tensor | None,
    out_start: Tensor, out_keys: Tensor, out_values: Tensor, out_cardinality: Tensor, out_log_n: Tensor,
    out_position: Tensor, out_statistics: list[Tensor],
) -> None:  # fmt: skip
    """Shapes and types of ``ragged_compact``."""
    check_float("keys", keys, True)
    check_shape("keys", keys, (-1, -1, -1))
    heads, width, dim = keys.shape
    check_head_dim(dim)
    check_source("keys", keys, keys.dtype, (heads, width, dim), keys)
    check_source("values", values, keys.dtype, (heads, width, -1), keys)
    check_source("cardinality", cardinality, torch.int32, (heads, width), keys)
    check_source("position", position, torch.int32, (heads, width), keys)
    check_source("rotary", rotary, torch.int64, (heads, width), keys)
    check_source("order", order, torch.int32, (heads, width), keys)
    check_source("offset", offset, torch.int32, (heads, width + 1), keys)
    check_source("inv_freq", inv_freq, torch.float32, (dim // 2,), keys)
    check_contiguous("inv_freq", inv_freq)
    if key_weight is not None:
        check(key_weight.ndim == 3 and key_weight.shape[2] in (1, dim),
              f"key_weight must be [N, T, 1] or [N, T, D]; found {list(key_weight.shape)}")  # fmt: skip
        compute = torch.promote_types(keys.dtype, torch.float32)
        check_source("key_weight", key_weight, compute, (heads, width, key_weight.shape[2]), keys)
    if target_rotary is not None:
        check_source("target_rotary", target_rotary, torch.int64, (heads, width), keys)
    check_index("out_start", out_start, heads, keys)
    check_columns(out_keys, out_values, out_cardinality, out_log_n, out_position, "out_")
    check_same_device("out_keys", out_keys, keys)
    check_dtype("out_keys", out_keys, keys.dtype)
    check_shape("out_keys", out_keys, (-1, dim))
    check_shape("out_values", out_values, (out_keys.shape[0], values.shape[2]))
    check(len(statistics) == len(out_statistics), "out_statistics must have as many columns as statistics, "
          f"{len(statistics)}; found {len(out_statistics)}")  # fmt: skip
    for x, y in zip(statistics, out_statistics, strict=True):
        check_float("statistics", x, True)
        check(x.ndim in (2, 3), f"statistics must be [N, T] or [N, T, E]; found {list(x.shape)}")
        check_source("statistics", x, x.dtype, (heads, width, *x.shape[2:]), keys)
        check_dtype("out_statistics", y, x.dtype)
        check_shape("out_statistics", y, (out_keys.shape[0], *x.shape[2:]))
        check_contiguous("out_statistics", y)
        check_same_device("out_statistics", y, keys)


def check_decode(
    query: Tensor, keys: Tensor, values: Tensor, log_n: Tensor | None, start: Tensor, length: Tensor, scale: float,
    position: Tensor | None = None, query_position: Tensor | None = None,
) -> None:  # fmt: skip
    """Shapes and types of ``lma_decode``."""
    check_float("keys", keys, False)
    check_shape("keys", keys, (-1, -1))
    check_head_dim(keys.shape[1])
    check_contiguous("keys", keys)
    rows, dim = keys.shape
    for name, x, shape in (("values", values, (rows, -1)), ("query", query, (-1, -1, dim))):
        check_dtype(name, x, keys.dtype)
        check_shape(name, x, shape)
        check_contiguous(name, x)
    if log_n is not None:
        check_dtype("log_n", log_n, torch.float32)
        check_shape("log_n", log_n, (rows,))
        check_contiguous("log_n", log_n)
    for name, x in (("start", start), ("length", length)):
        check_index(name, x, query.shape[0], keys)
    check((position is None) == (query_position is None), "query_position must be given together with position")
    if position is not None and query_position is not None:
        check_dtype("position", position, torch.int32)
        check_shape("position", position, (rows,))
        check_contiguous("position", position)
        check_dtype("query_position", query_position, torch.int64)
        check_shape("query_position", query_position, tuple(query.shape[:2]))
        check_contiguous("query_position", query_position)


def check_statistics(
    query: Tensor, keys: Tensor, values: Tensor, log_n: Tensor, position: Tensor, query_position: Tensor, lse: Tensor,
    out: Tensor | None = None,
) -> None:  # fmt: skip
    """Shapes and types of ``attention_mass`` (values = keys) and ``key_curvature``."""
    check_float("keys", keys, False)
    check_shape("keys", keys, (-1, -1, -1))
    heads, rows, dim = keys.shape
    check_head_dim(dim)
    check_source("keys", keys, keys.dtype, (heads, rows, dim), keys)
    check_source("values", values, keys.dtype, (heads, rows, dim), keys)
    check_dtype("query", query, keys.dtype)
    check_shape("query", query, (heads, -1, -1, dim))
    check_contiguous("query", query)
    check_source("log_n", log_n, torch.float32, (heads, rows), keys)
    check_source("position", position, torch.int32, (heads, rows), keys)
    named = [("query_position", query_position, torch.int64, (heads, query.shape[2])),
             ("lse", lse, torch.float32, tuple(query.shape[:3]))]  # fmt: skip
    if out is not None:
        named.append(("out", out, keys.dtype, tuple(query.shape)))
    for name, x, dtype, shape in named:
        check_dtype(name, x, dtype)
        check_shape(name, x, shape)
        check_contiguous(name, x)
