"""ZACK (arXiv 2408.04107): keys and values in the leading directions of a basis that was calibrated per head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.checks import check_choice, check_flag, check_integer, check_number
from asymkv.dimensions.basis import Basis, load
from asymkv.dimensions.projection import Folded, Linear, Projection, fold_input, fold_output
from asymkv.dimensions.ranks import POLICIES, choose_ranks
from asymkv.models import get_adapter

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig

FOLDS = (False, True, "all")
DEFAULT_RATIO = 0.5


@dataclasses.dataclass(frozen=True)
class Zack:
    """Rows in fewer dimensions; the factor of the logits stays that of the full size.

    Args:
        ratio: share of dimensions kept, of keys and of values; None = 0.5, or the configuration's ``ratio`` where the
            method keeps every row.
        ranks: "layer" (by energy, one rank for all heads of a layer: every stored number counts), "energy" (by energy
            per head, as published; heads are stored as wide as the widest of their layer, zeros behind) or "uniform".
        multiple: ranks are multiples of it, even.
        least: dimensions that every head keeps.
        basis: folder that ``scripts/calibrate_zack.py`` wrote, or one of such folders by model; None = the user's
            cache folder.
        keys: False: keys stay as they are, before and after RoPE.
        values: False: values stay as they are.
        fold: True: the values' basis is folded into the weights around it, at a copy of those weights; "all": that of
            queries and keys too, which only a model without rotary positions allows; False: rotated at run time.
    """

    ratio: float | None = None
    ranks: str = "layer"
    multiple: int = 8
    least: int = 8
    basis: str | None = None
    keys: bool = True
    values: bool = True
    fold: bool | str = False

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_number("ratio of dimensions='zack'", self.ratio, 0, 1)
            if self.ratio == 0:
                raise ValueError("ratio of dimensions='zack' must be above 0; found 0")
        check_choice("ranks of dimensions='zack'", self.ranks, POLICIES)
        check_integer("multiple of dimensions='zack'", self.multiple, 2)
        if self.multiple % 2:
            raise ValueError(f"multiple of dimensions='zack' must be even; found {self.multiple}")
        check_integer("least of dimensions='zack'", self.least, 1)
        check_flag("keys of dimensions='zack'", self.keys)
        check_flag("values of dimensions='zack'", self.values)
        check_choice("fold of dimensions='zack'", self.fold, FOLDS)
        if self.fold and not self.values or self.fold == "all" and not self.keys:
            raise ValueError(f"fold={self.fold!r} of dimensions='zack' needs what it folds; found keys={self.keys}, "
                             f"values={self.values}")
        if isinstance(self.basis, Path):
            object.__setattr__(self, "basis", str(self.basis))

    def settled(self, config: CompressionConfig) -> Zack:
        """These settings with a ratio.

        Raises:
            ValueError: for settings that stored coordinates cannot serve.
        """
        if self.keys and config.positions != "original":
            raise ValueError("projected keys cannot be turned to other positions; position_policy must be 'original' "
                             f"with dimensions='zack', found {config.positions!r} (or set keys: false)")
        if self.keys and "raw_queries" in config.options.needs:
            raise ValueError(f"method {config.method!r} works on queries and keys before RoPE, which projected keys do "
                             "not have; use another method with dimensions='zack', or set keys: false")
        config.options.check_dimensions(keys=self.keys, values=self.values)
        if self.ratio is not None:
            return self
        whole = config.ratio is not None and not config.options.compresses
        return dataclasses.replace(self, ratio=config.ratio if whole else DEFAULT_RATIO)

    def prepare(self, model: PreTrainedModel) -> tuple[list[Projection], str]:
        """The projections of a model's layers, and the sha256 of the basis that they come from.

        Raises:
            ValueError: where the basis is missing, damaged or of another model, ranks do not fit, or weights cannot be
                folded.
        """
        basis = load(self.basis, model)
        key_ranks, value_ranks = self.ranks_of(basis)
        keys = cut(basis.keys, key_ranks) if self.keys else [None] * len(basis.keys)
        values = cut(basis.values, value_ranks) if self.values else [None] * len(basis.values)
        adapter = get_adapter(model.config.model_type)
        found: Any = (m for m in model.modules() if isinstance(m, adapter.attention_class()))
        modules = {module.layer_idx: module for module in found}
        rotary: Any = adapter.rotary(model)
        if self.fold == "all" and rotary.inv_freq.any():
            raise ValueError(f"fold='all' of dimensions='zack': {model.config.model_type!r} rotates queries and keys "
                             "by their positions, between projection and dot product; allowed: True (values) and "
                             "False")
        # Normal tensors even under inference_mode: a later turn outside it may need gradients through them.
        with torch.inference_mode(False), torch.no_grad():
            layers = enumerate(zip(keys, values, strict=True))
            return [self._projection(adapter, modules[i], k, v, model.dtype) for i, (k, v) in layers], basis.sha256

    def _projection(
        self, adapter: Any, module: Any, keys: Tensor | None, values: Tensor | None, dtype: torch.dtype
    ) -> Projection:
        device = adapter.output_weight(module).device
        # Offloaded weights do not say where a layer computes.
        device = torch.device("cpu") if device.type == "meta" else device
        k, v = (None if x is None else x.to(device, dtype, copy=True) for x in (keys, values))
        return Projection(k, v, self._fold(adapter, module, keys, values) if self.fold else None)

    def ranks_of(self, basis: Basis) -> tuple[Tensor, Tensor]:
        """Ranks ``[L, H_kv]`` of keys and of values."""
        ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
        how = {"multiple": self.multiple, "least": self.least}
        key, value = (choose_ranks(e, ratio, self.ranks, **how) for e in (basis.key_energy, basis.value_energy))
        return key, value

    def _fold(self, adapter: Any, module: Any, keys: Tensor | None, values: Tensor | None) -> Folded:
        assert values is not None
        weights = adapter.weights(module)
        (output, bias), (value, value_bias) = weights["output"], weights["value"]
        folded = Folded(fold_input(value, value_bias, values), Linear(fold_output(output, values), bias))
        if self.fold != "all":
            return folded
        assert keys is not None
        query, key = (fold_input(w, b, keys) for w, b in (weights["query"], weights["key"]))
        return dataclasses.replace(folded, query=query, key=key)


def cut(vectors: Tensor, ranks: Tensor) -> Sequence[Tensor]:
    """Per layer, the leading columns of ``vectors [L, H_kv, D, D]`` as many as its largest rank, zeros beyond a
    head's own ``ranks [L, H_kv]``: ``[H_kv, D, r]``."""
    out = []
    for basis, own in zip(vectors, ranks, strict=True):
        width = int(own.max())
        kept = torch.arange(width) < own[:, None, None]
        out.append(torch.where(kept, basis[..., :width], 0))
    return out
