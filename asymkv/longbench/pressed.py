"""Stock caches that a kvpress press has pruned or masked, and model calls that go on from them.

A press works inside one prefill. What follows on its cache (a question, a gold answer, greedy decoding) needs two
things that the cache's own length no longer tells: the tokens' true positions, and for each layer which rows are in
view. A press may leave layers of different lengths, or leave every row where it is and only hide some of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

# From the prompt's length in tokens to a press, or None where nothing is to be removed.
PressOf = Callable[[int], Any]
# Where kvpress says which (batch, heads, rows) of a layer are out of view.
Masked = tuple[Any, Any, Any] | None

logger = logging.getLogger(__name__)


class PressedCache(DynamicCache):
    """A ``DynamicCache`` of one sequence, and what a press has made of it.

    Attributes:
        tokens_seen: tokens whose keys were computed; the next token's position, unless the press moved its keys.
        next_position: position of the next token.
        hidden: by layer, which of the first rows are out of view, bool ``[H_kv, n]``.
        peak_rows: most rows that a head held.
        peak_nbytes: most bytes of all layers together, at every append.
        settled: whether the press is through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens_seen = 0
        self.next_position = 0
        self.hidden: dict[int, Tensor] = {}
        self.peak_rows = 0
        self.peak_nbytes = 0
        self.settled = False

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends to a layer, as in the base class, and takes note of the peak."""
        out = super().update(*args, **kwargs)
        self.peak_rows = max(self.peak_rows, *self.rows())
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        return out

    def rows(self) -> list[int]:
        """Rows stored by layer; all heads of a layer hold as many."""
        return [layer.keys.shape[2] if layer.is_initialized else 0 for layer in self.layers]

    def rows_in_view(self) -> list[int]:
        """Rows that attention sees, by layer and KV head."""
        counts = []
        for index, layer in enumerate(self.layers):
            heads, rows = layer.keys.shape[1:3]
            hidden = self.hidden[index].sum(1).tolist() if index in self.hidden else [0] * heads
            counts += [rows - gone for gone in hidden]
        return counts

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers behind keys and values."""
        buffers = [x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)]
        return sum(x.untyped_storage().nbytes() for x in buffers)

    def settle(self, masks: Sequence[Masked], tokens: int, *, moves_keys: bool) -> None:
        """Takes over what a press left, and lets go of rows that only a view still holds.

        Args:
            masks: of every layer.
            tokens: that were read.
            moves_keys: whether kept keys were rotated to the positions 0, 1, ...
        """
        for index, (layer, masked) in enumerate(zip(self.layers, masks, strict=True)):
            layer.keys, layer.values = (_own(x) for x in (layer.keys, layer.values))
            if masked is not None:
                _, heads, rows = (torch.as_tensor(x, device=layer.keys.device) for x in masked)
                hidden = torch.zeros(layer.keys.shape[1:3], dtype=torch.bool, device=layer.keys.device)
                hidden[heads, rows] = True
                self.hidden[index] = hidden
        self.tokens_seen = tokens
        self.next_position = max(self.rows()) if moves_keys else tokens
        self.settled = True

    def attention_mask(self, index: int, tokens: int, groups: int, dtype: torch.dtype) -> Tensor | None:
        """What a layer adds to the logits of the next ``tokens``: 0, or the lowest number where a row is out of view.

        Args:
            index: of the layer.
            tokens: queries, whose own rows are not in the cache yet.
            groups: query heads per KV head.
            dtype: of the logits.

        Returns:
            ``[1, 1 or H, tokens, rows + tokens]``, or None where everything is in view.
        """
        hidden, rows = self.hidden.get(index), self.rows()[index]
        if tokens == 1 and hidden is None:
            return None
        device = self.layers[index].keys.device
        closed = torch.ones(tokens, rows + tokens, dtype=torch.bool, device=device).triu(rows + 1)[None]
        if hidden is not None:
            padded = nn.functional.pad(hidden, (0, rows + tokens - hidden.shape[1]))
            closed = closed | padded.repeat_interleave(groups, dim=0)[:, None]  # [H, tokens, rows + tokens]
        return torch.zeros(closed.shape, dtype=dtype, device=device).masked_fill_(closed, torch.finfo(dtype).min)[None]


def _own(x: Tensor) -> Tensor:
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules, by layer."""
    return [layer.self_attn for layer in model.model.layers]


def forget_masks(model: nn.Module) -> None:
    """Takes away which rows are hidden: kvpress keeps that on the modules, and looks at it in every later call."""
    for attention in attentions(model):
        attention.masked_key_indices = None


@contextlib.contextmanager
def pressed(model: PreTrainedModel, press_of: PressOf) -> Iterator[PreTrainedModel]:
    """Within the block a call without a cache fills a ``PressedCache`` and presses it; a call with one goes on from it.

    Args:
        model: a causal LM; its class stays as it is.
        press_of: makes the press of one prompt.
    """
    plain, own = model.forward, model.__dict__.get("forward")

    def forward(input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        tokens = input_ids.shape[1]
        if past_key_values is None:
            cache = PressedCache()
            with _pressing(model, press_of(tokens), input_ids, cache):
                out = plain(input_ids, past_key_values=cache, **kwargs)
            return out
        start = past_key_values.next_position
        positions = torch.arange(start, start + tokens, device=input_ids.device)[None]
        out = plain(input_ids, past_key_values=past_key_values, position_ids=positions, **kwargs)
        past_key_values.tokens_seen += tokens
        past_key_values.next_position += tokens
        return out

    hooks = [module.register_forward_pre_hook(_show_what_is_in_view, with_kwargs=True) for module in attentions(model)]
    model.forward = forward
    try:
        yield model
    finally:
        del model.forward
        if own is not None:
            model.forward = own
        for hook in hooks:
            hook.remove()


def _show_what_is_in_view(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gives a layer the mask of its own rows: the model's mask is made for the first layer's length."""
    cache, states = kwargs.get("past_key_values"), kwargs["hidden_states"]
    if not isinstance(cache, PressedCache) or not cache.settled:
        return None
    groups = module.num_key_value_groups
    mask = cache.attention_mask(module.layer_idx, states.shape[1], groups, states.dtype)
    return args, {**kwargs, "attention_mask": mask}


@contextlib.contextmanager
def _pressing(model: PreTrainedModel, press: Any, input_ids: Tensor, cache: PressedCache) -> Iterator[None]:
    """A prefill under a press, which may run the model again after it."""
    context: Any = contextlib.nullcontext()
    moves_keys = False
    if press is not None:
        from asymkv.longbench import presses

        context, moves_keys = presses.pressing(model, press, input_ids), presses.moves_keys(press)
    try:
        with context:
            yield
        masks = [getattr(attention, "masked_key_indices", None) for attention in attentions(model)]
        cache.settle(masks, input_ids.shape[1], moves_keys=moves_keys)
    finally:
        forget_masks(model)


@torch.no_grad()
def press_together(
    model: PreTrainedModel, presses: Sequence[Any], moves_keys: Sequence[bool], input_ids: Tensor
) -> tuple[list[PressedCache | None], Tensor]:
    """One prefill of ``input_ids [1, t]``, and the cache that each press would have left in a prefill of its own.

    Args:
        model: a causal LM, with the attention implementation that the presses want.
        presses: of one :func:`asymkv.longbench.presses.prefill_key`: they see a layer once it has been computed, and
            leave what it computes as it is.
        moves_keys: for each press, as in :meth:`PressedCache.settle`.
        input_ids: the prompt.

    Returns:
        The caches, None for a press that failed on the prompt (alone it says why), and the last token's logits ``[V]``.
    """
    caches: list[PressedCache | None] = [PressedCache() for _ in presses]
    masks: list[list[Masked]] = [[] for _ in presses]

    def attempt(i: int, work: Callable[..., Any], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:
            logger.warning("%s fails in a shared prefill and is run alone: %s", type(presses[i]).__name__, error)
            caches[i] = None

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        full = kwargs["past_key_values"].layers[module.layer_idx]
        for i, (press, own) in enumerate(zip(presses, caches, strict=True)):
            if own is not None:
                own.update(full.keys, full.values, module.layer_idx)
                module.masked_key_indices = None
                attempt(i, press.forward_hook, module, args, {**kwargs, "past_key_values": own}, output)
                masks[i].append(module.masked_key_indices)
        module.masked_key_indices = None
        full.keys, full.values = full.keys[:, :, :0].clone(), full.values[:, :, :0].clone()  # read once, held by none

    for i, press in enumerate(presses):
        attempt(i, press.post_init_from_model, model)
    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in attentions(model)]
    for module in attentions(model):
        module.rotary_emb = model.model.rotary_emb  # as kvpress's own context does
    try:
        logits = model(input_ids, past_key_values=PressedCache(), logits_to_keep=1).logits[0, -1]
    finally:
        for handle in hooks:
            handle.remove()
    for cache, own, moves in zip(caches, masks, moves_keys, strict=True):
        if cache is not None:
            cache.settle(own, input_ids.shape[1], moves_keys=moves)
    return caches, logits
