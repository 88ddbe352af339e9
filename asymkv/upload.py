"""Host numbers to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(numbers: list[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of (nested) host numbers on a device, without waiting for it."""
    table = torch.tensor(numbers, dtype=dtype)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)
