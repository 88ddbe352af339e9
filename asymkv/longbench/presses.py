"""Builds and applies kvpress presses. Imports kvpress, which patches attention functions of the whole process.

Only the worker of ``asymkv.longbench.peers`` imports this module, in kvpress's own environment.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import kvpress
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from asymkv.longbench import pressed
from asymkv.longbench.press_arms import PressError, PressSpec
from asymkv.longbench.pressed import PressedCache

# Presses that are more than one call around a prefill.
REFUSED = {
    "CAMPress": "it works on generated tokens",
    "ComposedPress": "it has several ratios",
    "CompressionRatioDecodingPress": "it works on generated tokens",
    "DMSPress": "it has a threshold instead of a ratio",
    "DecodingPress": "it works on generated tokens",
    "DuoAttentionPress": "its ratio is one of heads",
    "FinchPress": "it wants a delimiter token in the prompt",
    "PerLayerCompressionPress": "it has several ratios",
    "PrefillDecodingPress": "it works on generated tokens",
    "RestoreKVPress": "it adds rows of a trained adapter",
    "ThinKPress": "it removes channels and stores as much as before",
}
RATIO, BASE = "compression_ratio", "press"

logger = logging.getLogger(__name__)
# KVzip warns at every construction that it takes long.
logging.getLogger("kvpress").setLevel(logging.ERROR)


def available() -> list[str]:
    """Names of the presses that can be arms."""
    bases = {"BasePress", "ScorerPress"}
    classes = {name: getattr(kvpress, name) for name in kvpress.__all__}
    presses = {name for name, cls in classes.items() if isinstance(cls, type) and issubclass(cls, kvpress.BasePress)}
    return sorted(presses - bases - REFUSED.keys())


def build(spec: PressSpec, compression_ratio: float = 0.0) -> kvpress.BasePress:
    """Makes a press.

    Args:
        spec: class, arguments, and the press that it wraps.
        compression_ratio: share of rows to remove.

    Raises:
        PressError: for an unknown press or argument; lists those that there are.
    """
    press = _construct(spec)
    press.compression_ratio = compression_ratio
    return press


def _construct(spec: PressSpec) -> kvpress.BasePress:
    if spec.name in REFUSED:
        raise PressError(f"{spec.name} cannot be an arm: {REFUSED[spec.name]}; available: {', '.join(available())}")
    if spec.name not in available():
        raise PressError(f"kvpress has no press {spec.name!r}; available: {', '.join(available())}")
    cls = getattr(kvpress, spec.name)
    known = inspect.signature(cls).parameters
    allowed = sorted(known.keys() - {RATIO, BASE})
    unknown = sorted(spec.arguments.keys() - set(allowed))
    if unknown:
        raise PressError(f"{spec.name} has no arguments {unknown}; it has {allowed} (the ratio is the arm's)")
    if (BASE in known) != (spec.base is not None):
        wanted = f"wraps a press: base: {{press: SnapKVPress}}, or {spec.name}(SnapKVPress)"
        raise PressError(f"{spec.name} {wanted if BASE in known else 'wraps no other press'}")
    base = {} if spec.base is None else {BASE: _construct(spec.base)}
    try:
        return cls(**base, **spec.arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise PressError(f"{spec.label}: {error}") from error


def moves_keys(press: Any) -> bool:
    """Whether the kept keys are rotated to the positions 0, 1, ..., so that the next token follows on them."""
    return isinstance(press, kvpress.KeyRerotationPress)


@contextlib.contextmanager
def pressing(model: PreTrainedModel, press: Any, input_ids: Tensor) -> Iterator[None]:
    """One prefill of ``input_ids`` under a press.

    Raises:
        PressError: for anything that goes wrong inside, with the press's name.
    """
    try:
        with _attention(model, "eager" if _reads_attention(press) else None), press(model):
            if hasattr(press, "prefix_length") and not _starts_with_chat_header(model, input_ids):
                # KVzip gives the chat header no score. Of a prompt without one it would evict the first words.
                press.prefix_length = 0
            yield
    except Exception as error:
        raise PressError(f"{type(press).__name__}: {type(error).__name__}: {error}") from error


def prefill_key(spec: PressSpec) -> str | None:
    """What presses must agree in to share one prefill; None: this one runs the model in a way of its own.

    Those that only look at each layer after it was computed may share it, with the attention that they want. KVzip
    scores alike whatever its ratio, so that its ratios share prefill and replays.
    """
    inner: Any = build(spec)
    press, plain = inner, kvpress.BasePress
    if type(press) is kvpress.KVzipPress:
        return f"KVzip {sorted(spec.arguments.items())}"
    while inner is not None:
        if type(inner).__call__ is not plain.__call__ or type(inner).forward_hook is not plain.forward_hook:
            return None
        inner = getattr(inner, BASE, None)
    return "eager" if _reads_attention(press) else "default"


def press_together(
    model: PreTrainedModel, specs: Sequence[PressSpec], shares: Sequence[float], input_ids: Tensor
) -> tuple[list[PressedCache | None], Tensor]:
    """:func:`asymkv.longbench.pressed.press_together` of presses of one :func:`prefill_key`.

    Args:
        model: a causal LM.
        specs: the presses.
        shares: of rows that each keeps.
        input_ids: ``[1, t]``.
    """
    presses = [build(spec, 1 - share) for spec, share in zip(specs, shares, strict=True)]
    if isinstance(presses[0], kvpress.KVzipPress):
        return _kvzip_together(model, presses, input_ids)
    with _attention(model, "eager" if _reads_attention(presses[0]) else None):
        return pressed.press_together(model, presses, [moves_keys(press) for press in presses], input_ids)


@torch.no_grad()
def _kvzip_together(
    model: PreTrainedModel, presses: Sequence[Any], input_ids: Tensor
) -> tuple[list[PressedCache | None], Tensor]:
    """One prefill and one replay of each chunk, and the rows that every ratio hides by those scores.

    A press that keeps everything replays nothing: None, it is run alone.
    """
    scorer = max(presses, key=lambda press: press.compression_ratio)
    found: dict[int, list[Any]] = {}
    modules = pressed.attentions(model)

    def hide(lm: PreTrainedModel) -> None:
        for i, press in enumerate(presses):
            press.score_val = scorer.score_val.clone()
            type(press).compress_post(press, lm)
            found[i] = [module.masked_key_indices for module in modules]
            pressed.forget_masks(model)

    scorer.compress_post = hide
    filled = PressedCache()
    try:
        with pressing(model, scorer, input_ids):
            logits = model(input_ids, past_key_values=filled, logits_to_keep=1).logits[0, -1]
    except PressError as error:
        logger.warning("%s; its ratios are run alone", error)
        return [None] * len(presses), torch.empty(0)
    finally:
        pressed.forget_masks(model)
    caches: list[PressedCache | None] = []
    for i in range(len(presses)):
        cache = copy.deepcopy(filled) if presses[i].compression_ratio > 0 else None
        if cache is not None:
            cache.settle(found[i], input_ids.shape[1], moves_keys=False)
        caches.append(cache)
    return caches, logits


def _reads_attention(press: Any) -> bool:
    inner = getattr(press, BASE, None)
    return isinstance(press, kvpress.ObservedAttentionPress) or (inner is not None and _reads_attention(inner))


@contextlib.contextmanager
def _attention(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """The model with another attention implementation."""
    before = model.config._attn_implementation
    if name is not None:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if name is not None:
            model.set_attn_implementation(before)


def _starts_with_chat_header(model: PreTrainedModel, input_ids: Tensor) -> bool:
    header = _chat_header(model.config.name_or_path)
    return input_ids[0, : len(header)].tolist() == list(header)


@functools.cache
def _chat_header(path: str) -> tuple[int, ...]:
    """Ids of what the chat template puts before the user's text."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        return ()
    text = "some words"
    turn = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer.encode(rendered.split(text)[0], add_special_tokens=False))
