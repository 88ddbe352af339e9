"""The only file that knows transformers versions.

Tested window: ``OLDEST`` to the newest 5.x. What changed inside it and is met here: the name of the layer's length
method (``get_max_cache_shape``, then ``get_max_length``), the argument of ``get_mask_sizes`` (``cache_position``
tensor, then ``query_length`` int), and what a positive argument of ``crop`` means.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

OLDEST = "5.0.0"
FOUND = transformers.__version__

if not Version("5.0.0.dev0") <= Version(FOUND) < Version("6"):
    raise ImportError(f"asymkv needs transformers >= {OLDEST}, < 6; found {FOUND}")

__all__ = ["Cache", "CausalLMOutputWithPast", "LayerBase", "bind_forward", "checkpoints_activations",
           "columns_to_crop", "generation_request"]  # fmt: skip


class LayerBase(CacheLayerMixin):
    """A cache layer whose lengths are logical: tokens seen, whatever the number of rows stored."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self) -> None:
        # Not super().__init__(): it sets `keys` and `values` tensors, which a ragged layer does not have.
        self.is_initialized = False

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Storage is made at the first append."""

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Logical ``(kv_length, kv_offset)``; our attention builds its own mask from positions."""
        new = query if isinstance(query, int) else query.shape[0]
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length


def generation_request(args: tuple, kwargs: dict) -> tuple[Any, dict, Any, int]:
    """``(generation_config, model_kwargs, generation_mode, max_cache_length)``: what
    ``_prepare_cache_for_generation`` was given.
    """
    names = ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length")
    values = [kwargs[n] if n in kwargs else args[i] for i, n in enumerate(names)]
    return values[0], values[1], values[2], values[4]


def bind_forward(original: Any, module: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments of a causal LM's ``forward`` by name, extra keyword arguments included."""
    # A subclass may hand all on: the names are then its base's.
    bases = [vars(cls)["forward"] for cls in type(module).__mro__ if "forward" in vars(cls)]
    signatures = map(inspect.signature, [original, *bases])
    signature = next(s for s in signatures if not _kind_of(s, inspect.Parameter.VAR_POSITIONAL))
    given = dict(signature.bind(module, *args, **kwargs).arguments)
    given.pop(next(iter(given)))  # self
    extra = given.pop(_kind_of(signature, inspect.Parameter.VAR_KEYWORD), {})
    return {**given, **extra}


def _kind_of(signature: inspect.Signature, kind: Any) -> str:
    """The name of a signature's first parameter of a kind; empty if there is none."""
    return next((name for name, parameter in signature.parameters.items() if parameter.kind is kind), "")


def checkpoints_activations(model: Any) -> bool:
    """Whether transformers' own gradient checkpointing is on, which drops the cache in training mode."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def columns_to_crop(argument: int, seen: int) -> int:
    """Columns that ``crop(argument)`` removes: ``-n`` removes n; older generate passes the length to keep instead."""
    legacy = "tokens_to_remove" not in inspect.signature(DynamicLayer.crop).parameters
    return seen - argument if legacy and argument > 0 else -argument
