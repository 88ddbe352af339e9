"""What every Triton launcher shares: whether Triton can run here, limits, and a launch as a value.

A launch is built by one function and either run or, without any GPU, compiled by :mod:`asymkv.ops._triton_check`: what
is compiled is what is launched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is launched with.

    Args:
        module: where the kernel is.
        kernel: its name there.
        grid: numbers of programs.
        args: tensors, numbers and None in the order of the kernel's parameters.
        constants: its compile-time constants.
        warps: per program.
        stages: depth of the software pipeline of the loop.
    """

    module: str
    kernel: str
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int

    def function(self) -> Any:
        """The ``triton.jit`` function; imports Triton."""
        return getattr(importlib.import_module(self.module), self.kernel)

    def run(self, device: torch.device) -> None:
        """Starts the kernel on the current stream of ``device``."""
        guard = torch.cuda.device(device) if device.type != "cpu" else contextlib.nullcontext()
        with guard:
            self.function()[self.grid](*self.args, **self.constants, num_warps=self.warps, num_stages=self.stages)


def available() -> str | None:
    """None if the Triton kernels can run here (a CUDA device, or Triton's interpreter), else a sentence why not."""
    try:
        kernels = importlib.import_module("asymkv.ops.triton_kernels")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install triton>=3.5 or choose the backend 'sdpa'"
    if kernels.TOO_LATE:
        return "TRITON_INTERPRET=1 was set after Triton was first imported (transformers imports it); set it before"
    if kernels.INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA device, and TRITON_INTERPRET=1 was not set before Triton was first imported"


@functools.cache
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter; fixed when Triton is first imported.

    Raises:
        ImportError: Triton is not installed.
    """
    return bool(importlib.import_module("asymkv.ops.triton_kernels").INTERPRETED)


def power_of_two(number: int) -> int:
    """The least power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


def blocks(count: int, size: int) -> int:
    """Blocks of ``size`` that cover ``count``."""
    return -(-count // size)


def check_inputs(**tensors: Tensor) -> None:
    """Equal dtype and device, contiguous head dimension, and a head dimension and dtype that the kernels serve.

    Raises:
        ValueError: names the argument, what was found and what is allowed.
    """
    (first, like), *rest = tensors.items()
    if like.dtype not in DTYPES:
        raise ValueError(f"{first} must be one of {[str(t) for t in DTYPES]}; found {like.dtype}")
    if like.shape[-1] not in DIMS:
        raise ValueError(f"{first} must have a head dimension in {DIMS}; found {like.shape[-1]}")
    for name, x in rest:
        if x.dtype != like.dtype or x.shape[-1] != like.shape[-1]:
            raise ValueError(f"{name} must have {first}'s dtype {like.dtype} and head dimension {like.shape[-1]}; "
                             f"found {x.dtype}, {x.shape[-1]}")
    for name, x in tensors.items():
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension; found strides {x.stride()}")
        if x.device != like.device:
            raise ValueError(f"{name} must be on {first}'s device {like.device}; found {x.device}")


def check_table(name: str, table: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """A table must have this shape and dtype and be where ``like`` is.

    Raises:
        ValueError: names the argument, what was found and what is allowed.
    """
    if table.shape != shape or table.dtype != dtype or table.device != like.device:
        raise ValueError(f"{name} must be {dtype} {list(shape)} on {like.device}; "
                         f"found {table.dtype} {list(table.shape)} on {table.device}")
