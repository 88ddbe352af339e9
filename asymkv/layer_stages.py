"""Stages of layers, from lists or from files that are measured once per model (UNComp, arXiv 2410.03090)."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from asymkv.files import sha256
from asymkv.head_scores import default_path, model_of, read_checked, write_checked
from asymkv.provenance import note

FORMAT = "asymkv-layer-stages-1"
KIND = "stages"  # name of the file, <kind>.json beside the head scores
MEASURED = "measured"  # the source that is the user's cache folder


@dataclass(frozen=True)
class LayerStages:
    """One stage number per layer.

    Args:
        stages: from 0, never lower than the layer before.
        model: what they were measured on, from :func:`asymkv.head_scores.model_of`.
        measured: how they were measured: anything that json holds.
    """

    stages: list[int]
    model: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_stages(self.stages, "stages", self.model["layers"])

    def save(self, path: str | Path | None = None) -> Path:
        """Writes the file, whole or not at all; None: to where methods look for it.

        Returns:
            The path.
        """
        target = default_path(self.model, KIND) if path is None else Path(path)
        write_checked(target, {"format": FORMAT, **vars(self)})
        return target


def load(path: str | Path, model: PreTrainedModel | None = None) -> LayerStages:
    """Reads a file of stages; it must belong to ``model``, if one is given.

    Raises:
        ValueError: for a file that is missing, damaged, of another format, or of another model.
    """
    content = read_checked(path, FORMAT, model, "stages")
    note(KIND, sha256(json.dumps(content["stages"]).encode()))
    return LayerStages(content["stages"], content["model"], content["measured"])


def check_stages(stages: Any, name: str, layers: int | None = None) -> None:
    """Raises ValueError unless these are integers from 0 that never fall, one per layer (None: any number of them)."""
    numbers = isinstance(stages, (list, tuple)) and all(type(s) is int for s in stages)
    if not numbers or not stages or stages[0] != 0:
        raise ValueError(f"{name} must be stage numbers of the layers, the first 0; found {stages!r}")
    falls = [i for i in range(1, len(stages)) if stages[i] < stages[i - 1]]
    if falls:
        raise ValueError(f"{name} fall at layer {falls[0]}, which would need tokens that are gone; found {stages!r}")
    if layers is not None and len(stages) != layers:
        raise ValueError(f"{name} must be {layers} numbers, one per layer of the model; found {len(stages)}")


def resolve(source: str | list[int], model: PreTrainedModel, option: str) -> list[int]:
    """The stages of a model's layers.

    Args:
        source: one number per layer; a file, or a folder of ``stages.json``; or "measured": the file that
            ``scripts/find_retrieval_heads.py --kind stages`` left in the user's cache folder.
        model: the model.
        option: the setting that names the source, for messages.

    Raises:
        ValueError: for stages that are missing, damaged, of another model or another number of layers.
    """
    if not isinstance(source, str):
        check_stages(source, option, model.config.num_hidden_layers)
        return list(source)
    path = Path(source)
    if source == MEASURED:
        path = default_path(model_of(model), KIND)
        if not path.is_file():
            raise ValueError(
                f"no stages of {model.config._name_or_path!r} at {path}; measure them once with python scripts/"
                f"find_retrieval_heads.py --model {model.config._name_or_path or 'MODEL'} --kind stages --text-file "
                f"FILE, or give a file or a list as {option}"
            )
    return load(path / f"{KIND}.json" if path.is_dir() else path, model).stages


def tokens_of(stages: list[int], max_tokens: int, min_tokens: int) -> tuple[int, ...]:
    """Tokens that each layer sees at most: all in layer 0, then equal steps from ``max_tokens`` to ``min_tokens``.

    Of S stages, stage s sees ``min + (max - min) // (S - 1) * (S - 1 - s)``, as the authors' code has it for 5 and 8;
    a single stage sees ``max``.
    """
    last = stages[-1]
    step = (max_tokens - min_tokens) // last if last else 0
    kept = [min_tokens + step * (last - s) if last else max_tokens for s in stages]
    return (sys.maxsize, *kept[1:])
