"""Weights that accelerate keeps in main memory or on disk."""

from __future__ import annotations

from torch import Tensor, nn


def weight_of(module: nn.Module) -> Tensor:
    """The module's ``weight``, fetched where it rests; between forwards an offloaded module itself holds none.

    Raises:
        ValueError: for a weight without values that no accelerate hook can give.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not weight.is_meta:
        return weight
    hook = getattr(module, "_hf_hook", None)
    found = getattr(hook, "weights_map", None)
    if hook is None or found is None:
        raise ValueError(f"the weight of {type(module).__name__} is on the meta device and nothing says where its "
                         "values are; load the model with from_pretrained")  # fmt: skip
    return found["weight"].to(hook.execution_device)
