"""Ops over flattened rows: compiled where the extension serves the device, else the PyTorch reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asymkv.ops import checks, extension, reference, triton_attention, triton_launch


def native_append(keys: Tensor, new_keys: Tensor) -> bool:
    """Whether :func:`ragged_append_` runs compiled code for these rows: not where a gradient must flow."""
    flows = torch.is_grad_enabled() and new_keys.requires_grad
    return extension.serves(keys.device) and fits(keys.shape[-1]) and not flows


def fits(head_dim: int) -> bool:
    """Whether compiled code takes rows of this width."""
    return head_dim % 8 == 0 and head_dim <= checks.MAX_HEAD_DIM


def ragged_append_(*args: Tensor | None) -> None:
    """Compiled :func:`asymkv.ops.reference.ragged_append_`; ask :func:`native_append` first."""
    _call("ragged_append_", *args)


def compaction_layout(destination: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`asymkv.ops.reference.compaction_layout`.

    Raises:
        ValueError: for a malformed plan.
    """
    if destination.device.type == "cpu" and extension.loaded():
        return _call("compaction_layout", destination, length)
    return reference.compaction_layout(destination, length)


def ragged_compact(keys: Tensor, *args: Any) -> None:
    """See :func:`asymkv.ops.reference.ragged_compact`."""
    if extension.serves(keys.device) and fits(keys.shape[-1]):
        _call("ragged_compact", keys, *args)
    else:
        reference.compact_rows(keys, *args)


def native_columns(keys: Tensor) -> bool:
    """Whether :func:`attention_mass` and :func:`key_curvature` have compiled code for these rows ``[..., D]``."""
    built = extension.loaded()  # registers the kernels of both devices
    if keys.dtype == torch.float64:
        return False
    if keys.device.type == "cuda":
        return triton_attention.available() is None and keys.shape[-1] in triton_launch.DIMS
    return keys.device.type == "cpu" and built and fits(keys.shape[-1])


def attention_mass(query: Tensor, *args: Any) -> Tensor:
    """Compiled :func:`asymkv.ops.reference.attention_mass`; ask :func:`native_columns` first."""
    return _call("attention_mass", query, *args)


def key_curvature(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Compiled :func:`asymkv.ops.reference.key_curvature`; ask :func:`native_columns` first."""
    return _call("key_curvature", query, *args)


def _call(name: str, *args: Any) -> Any:
    """Calls a registered op; complaints about arguments are ValueErrors, as the reference's are."""
    try:
        return getattr(torch.ops.asymkv, name)(*args)
    except RuntimeError as error:
        if " must " in str(error).split(";")[0]:
            raise ValueError(str(error)) from None
        raise
