"""The C++/CUDA extension: loading it, and fake kernels for ``torch.compile``.

Its ops are ``torch.ops.asymkv.*``, with the names, arguments and semantics of the functions in
:mod:`asymkv.ops.reference`. The column sums, ``attention_mass`` and ``key_curvature``, run on CUDA as Triton kernels
that are registered here; they are there without the extension, too.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch
from torch import Tensor

from asymkv.ops import checks, triton_statistics

ADVICE = {
    "cpu": "asymkv runs without its C++ extension: appends, compactions and decode attention on the CPU are slower. "
           "Build it with: pip install --no-build-isolation -e . (needs a C++ compiler)",
    "cuda": "asymkv runs without its CUDA extension: appends and compactions on the GPU are slower. Build it with: pip "
            "install --no-build-isolation -e . (needs nvcc, CUDA's compiler)",
}  # fmt: skip


# As csrc/ops.cpp has them, for where the extension is not built.
COLUMN_SCHEMAS = {
    "attention_mass": "(Tensor query, Tensor keys, Tensor log_n, Tensor position, Tensor query_position, Tensor lse, "
                      "float scale) -> Tensor",
    "key_curvature": "(Tensor query, Tensor keys, Tensor values, Tensor log_n, Tensor position, Tensor query_position, "
                     "Tensor lse, Tensor out, float scale) -> (Tensor square, Tensor product)",
}  # fmt: skip


# Plain globals: torch.compile ignores functools.cache, and would trace down to the import, which breaks its graph.
_found: bool | None = None
_served: frozenset[str] = frozenset()


def loaded() -> bool:
    """Whether the extension is there; loads it, and registers what belongs to it, at the first call.

    One that is there but cannot be loaded (built for another torch, say) is reported with the loader's words.

    Raises:
        ImportError, OSError: it cannot be loaded, and ``ASYMKV_REQUIRE_EXT`` is 1.
    """
    global _found, _served
    if _found is None:
        found = _load()
        if found:
            _register_fakes()
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
            _served = frozenset(d for d in ("cpu", "cuda") if has_kernel("asymkv::ragged_append_", d.upper()))
        _register_columns(define=not found)
        _found = found
    return _found


def _load() -> bool:
    try:
        importlib.import_module("asymkv._C")
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "asymkv._C":
            return False  # not built
        if os.environ.get("ASYMKV_REQUIRE_EXT") == "1":
            raise
        warnings.warn(
            f"asymkv's C++ extension is there but cannot be loaded ({error}); rebuild it with: pip install "
            "--no-build-isolation -e .", RuntimeWarning, stacklevel=2,
        )  # fmt: skip
        return False
    return True


def serves(device: torch.device) -> bool:
    """Whether the row ops run natively on a device."""
    return loaded() and device.type in _served


@functools.cache
def warn_if_missing(kind: str) -> None:
    """Says once for a kind of device, "cpu" or "cuda", that the library runs there without compiled code."""
    if not serves(torch.device(kind)):
        warnings.warn(ADVICE[kind], RuntimeWarning, stacklevel=3)


def _register_fakes() -> None:
    fake = torch.library.register_fake
    fake("asymkv::ragged_append_")(_fake_append)
    fake("asymkv::compaction_layout")(_fake_layout)
    fake("asymkv::ragged_compact")(_fake_compact)
    fake("asymkv::lma_decode")(_fake_decode)


def _register_columns(*, define: bool) -> None:
    """The column sums on CUDA, by Triton, and their fake kernels for every device.

    Args:
        define: whether no extension has defined the ops; without one they have no kernel for the CPU.
    """
    for name, fake in (("attention_mass", _fake_mass), ("key_curvature", _fake_curvature)):
        if define:
            torch.library.define(f"asymkv::{name}", COLUMN_SCHEMAS[name])
        torch.library.register_kernel(f"asymkv::{name}", "cuda", getattr(triton_statistics, name))
        torch.library.register_fake(f"asymkv::{name}")(fake)


def _fake_append(*args: Tensor | None, **kwargs: Tensor | None) -> None:
    checks.check_append(*args, **kwargs)  # type: ignore[arg-type]


def _fake_layout(destination: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_layout(destination, length)
    heads, width = destination.shape
    order = destination.new_empty(heads, width, dtype=torch.int32)
    return order, destination.new_empty(heads, width + 1, dtype=torch.int32), torch.empty_like(length)


def _fake_compact(*args: Tensor | list[Tensor] | None) -> None:
    checks.check_compact(*args)  # type: ignore[arg-type]


def _fake_decode(
    query: Tensor, keys: Tensor, values: Tensor, log_n: Tensor | None, start: Tensor, length: Tensor, scale: float,
    position: Tensor | None = None, query_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    checks.check_decode(query, keys, values, log_n, start, length, scale, position, query_position)
    out = query.new_empty(*query.shape[:2], values.shape[1])
    return out, query.new_empty(query.shape[:2], dtype=torch.float32)


def _fake_mass(
    query: Tensor, keys: Tensor, log_n: Tensor, position: Tensor, query_position: Tensor, lse: Tensor, scale: float
) -> Tensor:
    checks.check_statistics(query, keys, keys, log_n, position, query_position, lse)
    return lse.new_empty(*query.shape[:2], keys.shape[1])


def _fake_curvature(
    query: Tensor, keys: Tensor, values: Tensor, log_n: Tensor, position: Tensor, query_position: Tensor, lse: Tensor,
    out: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    checks.check_statistics(query, keys, values, log_n, position, query_position, lse, out)
    square = lse.new_empty(keys.shape)
    return square, square.new_empty(*keys.shape[:2], keys.shape[2] // 2)
