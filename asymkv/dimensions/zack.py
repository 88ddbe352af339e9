"""ZACK (arXiv 2408.04107): keys and values in the leading directions of a basis that was calibrated per head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.checks import check_choice, check_flag, check_integer, check_number
from asymkv.dimensions.basis import OBJECTIVES, Basis, load
from asymkv.dimensions.projection import Folded, Linear, Projection, fold_input, fold_output
from asymkv.dimensions.ranks import check_ranks, choose_ranks, given_ranks
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
            method keeps every row; not with given ranks.
        ranks: "layer" (by energy, one rank for all heads of a layer: every stored number counts), "energy" (by energy
            per head, as published; heads are stored as wide as the widest of their layer, zeros behind), "uniform", or
            the ranks themselves: one integer, one for each layer, a list of one for each head of each layer, or
            ``{"keys": ..., "values": ...}`` of these.
        objective: what directions were chosen for: "joint" (one orthogonal basis holds most of queries and keys, one of
            values and output projection: as published) or "attention" (least error of the logits that attention gives
            weight to, and of its output: less is lost at the same ranks).
        multiple: ranks are multiples of it, even; given ranks may be any, and are stored with one zero if odd.
        least: dimensions that every head keeps, where ranks are not given.
        basis: folder that ``scripts/calibrate_zack.py`` wrote, or one of such folders by model; None = the user's
            cache folder.
        keys: False: keys stay as they are, before and after RoPE.
        values: False: values stay as they are.
        fold: True: the values' basis is folded into the weights around it, at a copy of those weights; "all": that of
            queries and keys too, which only a model without rotary positions allows; False: rotated at run time.
    """

    ratio: float | None = None
    ranks: str | int | Sequence[Any] | Mapping[str, Any] = "layer"
    objective: str = "joint"
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
        check_ranks(self.ranks)
        if not isinstance(self.ranks, str) and self.ratio is not None:
            raise ValueError(f"dimensions='zack' takes ratio or given ranks; found ratio={self.ratio}, "
                             f"ranks={self.ranks!r}")
        check_choice("objective of dimensions='zack'", self.objective, OBJECTIVES)
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
        whole = config.ratio is not None and not config.options.compresses
        if not isinstance(self.ranks, str):
            if whole:
                raise ValueError(f"method {config.method!r} keeps every row, and ranks={self.ranks!r} says how many "
                                 f"dimensions; ratio={config.ratio} would change nothing: leave it out")
            return self
        if self.ratio is not None:
            return self
        return dataclasses.replace(self, ratio=config.ratio if whole else DEFAULT_RATIO)

    def describe(self) -> str:
        """How many dimensions, and what they were chosen for where that is not the published objective."""
        size = f"{self.ratio:g}" if self.ratio is not None else f"ranks={self.ranks!r}"
        return size if self.objective == "joint" else f"{size} ({self.objective})"

    def prepare(self, model: PreTrainedModel) -> list[Projection]:
        """The projections of a model's layers.

        Raises:
            ValueError: where the basis is missing, damaged or of another model, ranks do not fit, or weights cannot be
                folded.
        """
        basis = load(self.basis, model)
        layers = self._layers(basis)
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
            return [self._placed(adapter, modules[i], cuts, model.dtype) for i, cuts in enumerate(layers)]

    def _layers(self, basis: Basis) -> list[Projection]:
        """Each layer's directions, cut to its ranks, as they were saved."""
        found = basis.of(self.objective)
        key_ranks, value_ranks = self.ranks_of(basis)
        nothing: Sequence[Tensor | None] = [None] * len(key_ranks)
        keys = cut(found.keys, key_ranks) if self.keys else nothing
        queries = cut(found.queries, key_ranks) if self.keys and found.queries is not found.keys else keys
        values = cut(found.values, value_ranks) if self.values else nothing
        outputs = cut(found.outputs, value_ranks) if self.values and found.outputs is not found.values else values
        return list(map(Projection, keys, values, queries, outputs))

    def _placed(self, adapter: Any, module: Any, cuts: Projection, dtype: torch.dtype) -> Projection:
        """A layer's directions where and as it computes; twins stay one tensor."""
        device = adapter.output_weight(module).device
        # Offloaded weights do not say where a layer computes.
        device = torch.device("cpu") if device.type == "meta" else device

        def place(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, dtype, copy=True)

        keys, values = place(cuts.keys), place(cuts.values)
        queries = keys if cuts.queries is cuts.keys else place(cuts.queries)
        outputs = values if cuts.outputs is cuts.values else place(cuts.outputs)
        folded = self._fold(adapter, module, cuts) if self.fold else None
        return Projection(keys, values, queries, outputs, folded)

    def ranks_of(self, basis: Basis) -> tuple[Tensor, Tensor]:
        """Ranks ``[L, H_kv]`` of keys and of values.

        Raises:
            ValueError: for given ranks of other layers or heads, or above the head size.
        """
        found = basis.of(self.objective)
        energies = {"keys": found.key_energy, "values": found.value_energy}
        if isinstance(self.ranks, str):
            ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
            how = {"multiple": self.multiple, "least": self.least}
            ranks = [choose_ranks(energy, ratio, self.ranks, **how) for energy in energies.values()]
        else:
            ranks = [given_ranks(self.ranks, part, energy.shape) for part, energy in energies.items()]
        return ranks[0], ranks[1]

    def _fold(self, adapter: Any, module: Any, cuts: Projection) -> Folded:
        assert cuts.values is not None and cuts.outputs is not None
        weights = adapter.weights(module)
        (output, bias), (value, value_bias) = weights["output"], weights["value"]
        folded = Folded(fold_input(value, value_bias, cuts.values), Linear(fold_output(output, cuts.outputs), bias))
        if self.fold != "all":
            return folded
        assert cuts.keys is not None and cuts.queries is not None
        (query, query_bias), (key, key_bias) = weights["query"], weights["key"]
        query_map, key_map = fold_input(query, query_bias, cuts.queries), fold_input(key, key_bias, cuts.keys)
        return dataclasses.replace(folded, query=query_map, key=key_map)


def cut(vectors: Tensor, ranks: Tensor) -> Sequence[Tensor]:
    """Per layer, ``[H_kv, D, r]``: the leading columns of ``vectors [L, H_kv, D, D]``, zeros beyond a head's own
    ``ranks [L, H_kv]``; r is the largest of a layer, or one more: even, as half types are read in pairs."""
    out = []
    for basis, own in zip(vectors, ranks, strict=True):
        width = int(own.max()) + int(own.max()) % 2
        kept = torch.arange(width) < own[:, None, None]
        out.append(torch.where(kept, basis[..., :width], 0))
    return out
