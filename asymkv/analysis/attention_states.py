"""Attention weights, keys and values of any decoder of transformers, head by head.

The model runs with an attention function of ours in transformers' attention interface (fp32, one head at a time), which
shows what it computes with. So every family that uses the interface can be observed, whatever its projections, norms,
groups, masks and rotary embedding; nothing of size ``[H, T, T]`` exists at once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

ATTENTION, KEYS, KEYS_PRE_ROPE, VALUES = "attention", "keys_post_rope", "keys_pre_rope", "values"
NAME = "asymkv_states"

# Called with one of the four names above, the layer, the head, and fp32 weights [T, T] (zero above the diagonal; per
# query head) or rows [T, D] (per KV head).
Look = Callable[[str, int, int, Tensor], None]


def watch_states(model: PreTrainedModel, ids: Tensor, look: Look) -> None:
    """Runs the model's decoder over ``ids [T]`` and shows every head's attention weights, keys and values.

    Keys are shown as the cache holds them, and as they were before the rotary embedding where the model has one. Layers
    come in order, and nothing is kept.

    Raises:
        ValueError: for a model whose layers do not use transformers' attention interface.
    """
    watching = _Watching(look)
    with torch.no_grad(), _attention_implementation(model), watching.hooks(model):
        token = _WATCHING.set(watching)
        try:
            model.base_model(input_ids=ids.to(model.device)[None], use_cache=False)
        finally:
            _WATCHING.reset(token)
    if not watching.layers:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) does not use transformers' attention interface; "
            "supported: decoders whose attention implementation can be set by name"
        )


def head_attention(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention weights of one head in fp32.

    Args:
        query: ``[T, D]``.
        key: ``[T, D]``.
        mask: ``[T, T]`` added to the logits; None = causal.
        scaling: factor of the logits.
        softcap: bound of the logits (Gemma 2).
        sink: scalar logit beside the keys' that takes weight and has no value (gpt-oss).

    Returns:
        ``[T, T]``; rows sum to 1, or less beside a sink.
    """
    logits = scaling * (query.float() @ key.float().T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:
        mask = torch.full_like(logits, -torch.inf).triu(1)
    logits = logits + mask.float()
    if sink is None:
        return logits.softmax(-1)
    return torch.cat((logits, sink.float().expand(len(logits), 1)), dim=-1).softmax(-1)[:, :-1]


class _Watching:
    """One run of a model.

    Args:
        look: who is shown the states.
    """

    def __init__(self, look: Look) -> None:
        self.look = look
        self.layers = 0
        self.inputs: dict[Any, dict[str, Any]] = {}
        self.unrotated: Tensor | None = None
        self.asking = False

    @contextlib.contextmanager
    def hooks(self, model: PreTrainedModel) -> Iterator[None]:
        """Remembers what modules that rotate take in until their attention has been seen."""
        rotating = [m for m in model.modules() if "position_embeddings" in _parameters(m)]
        handles = [m.register_forward_pre_hook(self._remember, with_kwargs=True) for m in rotating]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _remember(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.asking:
            self.inputs[module] = {**dict(zip(_parameters(module)[1:], args, strict=False)), **kwargs}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, weigh: Callable[..., Tensor]) -> Tensor:
        """Shows a layer's states and gives its output ``[1, T, H, D_v]``."""
        group = query.shape[1] // key.shape[1]
        out = value.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        if self.asking:
            self.unrotated = key
            return out.zero_()
        self.layers += 1
        for head in range(query.shape[1]):
            weights = weigh(head, query[0, head], key[0, head // group])
            self.look(ATTENTION, module.layer_idx, head, weights)
            out[0, :, head] = (weights @ value[0, head // group].float()).to(out.dtype)
        shown = {KEYS: key, KEYS_PRE_ROPE: self._before_rope(module), VALUES: value}
        for name, states in shown.items():
            for head, rows in enumerate(() if states is None else states[0]):
                self.look(name, module.layer_idx, head, rows.float())
        return out

    def _before_rope(self, module: Any) -> Tensor | None:
        """Keys ``[1, H_kv, T, D]`` of the layer at work as they are without a rotation; None if it takes none.

        The module runs once more with the identity as rotary embedding: right for any layout of rotary dimensions,
        for fused projections and for norms of keys.
        """
        inputs = self.inputs.get(module, {})
        self.inputs = {}
        tables = inputs.get("position_embeddings")
        if tables is None:
            return None
        if isinstance(tables, Tensor):  # complex factors (Llama 4)
            identity: Tensor | tuple[Tensor, Tensor] = torch.ones_like(tables)
        else:
            cos, sin = tables
            identity = torch.ones_like(cos), torch.zeros_like(sin)
        self.asking = True
        try:
            module(**{**inputs, "position_embeddings": identity})
        finally:
            self.asking = False
        return self.unrotated


def _parameters(module: Any) -> list[str]:
    """Names of the arguments of a module's class, ``self`` first."""
    return list(inspect.signature(type(module).forward).parameters)


_WATCHING: ContextVar[_Watching] = ContextVar("asymkv_states")


def _watched(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function of transformers' interface; states ``[1, H or H_kv, T, D]``, output ``[1, T, H, D_v]``."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def weigh(head: int, q: Tensor, k: Tensor) -> Tensor:
        mask = None if attention_mask is None else attention_mask[0, head % attention_mask.shape[1]]
        return head_attention(q, k, mask, scaling, softcap, None if s_aux is None else s_aux[head])

    return _WATCHING.get().attend(module, query, key, value, weigh), None


AttentionInterface.register(NAME, _watched)
# Materialised masks: sliding windows and chunks come as they are.
AttentionMaskInterface.register(NAME, eager_mask)


@contextlib.contextmanager
def _attention_implementation(model: PreTrainedModel) -> Iterator[None]:
    """Switches the model to our attention function and back."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
