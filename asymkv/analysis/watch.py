"""Queries and keys of every layer while the stock model reads tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.models import get_adapter
from asymkv.rope import Rope, apply_rope

# Called with a layer's index, queries [H, S, D] and keys [H_kv, S, D], both after RoPE, and the factor of the logits.
Look = Callable[[int, Tensor, Tensor, float], None]
# Called with an attention module and the hidden states [1, S, hidden_size] that it takes in.
LookIn = Callable[[Any, Tensor], None]


def watch(model: PreTrainedModel, ids: Tensor, look: Look) -> None:
    """Runs the model's decoder over ``ids [S]`` and shows every layer's queries and keys; nothing is kept.

    Raises:
        ValueError: for a family that has no adapter.
    """
    adapter = get_adapter(model.config.model_type)
    cos, sin = Rope(adapter.rotary(model)).tables(torch.arange(len(ids), device=model.device)[None], model.dtype)

    def look_in(module: Any, hidden: Tensor) -> None:
        q, k, _ = adapter.project(module, hidden)
        tables = cos[:, None].to(q.device), sin[:, None].to(q.device)
        look(module.layer_idx, apply_rope(q, *tables)[0], apply_rope(k, *tables)[0], adapter.scale(module))

    watch_inputs(model, ids, look_in)


def watch_inputs(model: PreTrainedModel, ids: Tensor, look: LookIn) -> None:
    """Runs the model's decoder over ``ids [S]`` and shows what every layer's attention takes in; nothing is kept.

    Raises:
        ValueError: for a family that has no adapter.
    """
    adapter = get_adapter(model.config.model_type)

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        look(module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    attention = [m for m in model.modules() if isinstance(m, adapter.attention_class())]
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in attention]
    try:
        with torch.no_grad():
            adapter.decoder(model)(input_ids=ids.to(model.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def kv_heads(model: PreTrainedModel) -> int:
    """KV heads of a layer."""
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
