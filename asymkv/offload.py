"""Weights that accelerate keeps in main memory or on disk."""

from __future__ import annotations

from torch import Tensor, nn


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """The module's parameter ``name``, fetched where it rests; between forwards an offloaded module itself holds none.

    Raises:
        ValueError: for a parameter without values that no accelerate hook can give.
    """
    weight: Tensor = getattr(module, name)
    if not weight.is_meta:
        return weight
    hook = getattr(module, "_hf_hook", None)
    found = getattr(hook, "weights_map", None)
    if hook is None or found is None:
        raise ValueError(f"the {name} of {type(module).__name__} is on the meta device and nothing says where its "
                         "values are; load the model with from_pretrained")  # fmt: skip
    return found[name].to(hook.execution_device)
