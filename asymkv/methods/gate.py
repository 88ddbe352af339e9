"""A trained gate judges rows in one pass: what KVzip would keep, told from a row's own key and value."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.gates.gate import features, log_score, resolve
from asymkv.methods.base import Method
from asymkv.view import RowView

if TYPE_CHECKING:
    from asymkv.config import CompressionConfig
    from asymkv.layer import CompressedLayer


@dataclasses.dataclass(frozen=True)
class GateMethod(Method):
    """Keeps the rows that a small network, trained offline on KVzip's scores, thinks the best; no queries are needed.

    A score depends on nothing but the row's key before RoPE, its value and (of a gate that was taught it) the prompt's
    length, so that what is kept hardly depends on how the prompt was cut into chunks. One threshold over all layers and
    heads decides head budgets too.

    Args:
        file: the gate that ``scripts/train_gate.py`` wrote, or a folder of gates of several models; None = the one in
            the user's cache folder, else the shipped one.
    """

    title: ClassVar[str] = "Gate trained on KVzip's scores (cf. Fast KVzip, arXiv 2601.17668)"

    file: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", gate_path("file", self.file))

    def defaults(self) -> dict[str, Any]:
        """One threshold for the whole cache; every head keeps a small share of the even budget."""
        return {"layer_budgets": {"kind": "global", "floor": 0.2}}

    def validate(self, config: CompressionConfig) -> None:
        """A gate knows keys and values in the model's own coordinates only.

        Raises:
            ValueError: for rows that are stored in other ones.
        """
        super().validate(config)
        if config.dimensions is not None:
            raise ValueError(f"method 'gate' reads keys and values as the model makes them; dimensions must be None, "
                             f"found {config.dimensions!r}")

    def prepare_layers(self, model: PreTrainedModel, layers: Sequence[CompressedLayer]) -> None:
        """Finds the model's gate.

        Raises:
            ValueError: for a gate that is missing, damaged or of another model.
        """
        give_gate(self.file, model, layers)

    def score(self, view: RowView) -> Tensor:
        """Logarithm of the highest probability that a query is expected to give the row, ``[B, H_kv, T]``."""
        return gate_scores(view)


def gate_path(name: str, path: str | Path | None) -> str | None:
    """The option ``name``, a gate's file or folder, as text; ValueError for what is no path."""
    if path is not None and not isinstance(path, (str, Path)):
        raise ValueError(f"{name} must be the path of a gate or None; found {path!r}")
    return None if path is None else str(path)


def give_gate(file: str | None, model: PreTrainedModel, layers: Sequence[CompressedLayer]) -> None:
    """Gives every layer its networks; ValueError for a gate that is missing, damaged or of another model."""
    gate = resolve(file, model)
    for layer in layers:
        layer.learned = gate.layer(layer.index)


def gate_scores(view: RowView) -> Tensor:
    """What the view's gate thinks of each row, ``[B, H_kv, T]``: the expected logarithm of KVzip's score."""
    with torch.autocast(view.keys.device.type, enabled=False):
        x = features(view.unrotate(view.keys), view.values)
        view.learned.update({name: each.to(x) for name, each in view.learned.items()})  # moved and widened once
        return log_score(view.learned, x, view.context_tokens[:, None, None])
