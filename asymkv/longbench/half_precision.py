"""Linear layers in bfloat16 or float16 on a processor without instructions for them.

There torch multiplies such matrices much slower than float32 ones. Both sum in float32 and round once, so widening the
operands gives the same products, up to the order of the sum.
"""

from __future__ import annotations

import functools
import platform
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HALF = (torch.bfloat16, torch.float16)
# Below so many rows, as in decode, widening all the weights costs more than it saves.
MIN_ROWS = 4


def processor_lacks_half() -> bool:
    """Whether this is an x86 processor without AVX-512, whose half-precision products torch emulates."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def widen_products(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the half-precision linear layers that lie on the CPU multiply in float32; outputs keep their dtype.

    Weights stay as they are stored; each call widens its own copy. Layers of other dtypes, devices and classes, and
    those whose forward something else has replaced, are left alone.
    """
    for module in model.modules():
        stock = type(module) is nn.Linear and "forward" not in vars(module)
        if stock and module.weight.dtype in HALF and module.weight.device.type == "cpu":
            module.forward = functools.partial(_linear, module)
    return model


def is_widened(model: PreTrainedModel) -> bool:
    """Whether any layer multiplies in float32 by :func:`widen_products`."""
    forwards = (vars(module).get("forward") for module in model.modules())
    return any(isinstance(f, functools.partial) and f.func is _linear for f in forwards)


def _linear(module: nn.Linear, states: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    few = states.numel() < MIN_ROWS * states.shape[-1]
    if few or states.dtype not in HALF or states.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.linear(states, weight, bias)
    wide = F.linear(states.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(states.dtype)
