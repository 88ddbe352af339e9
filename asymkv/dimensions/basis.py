"""Bases of heads on disk: measured once per model, bound to its weights and checked against damage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.files import replace_file, sha256_file
from asymkv.head_scores import model_of, read_checked, write_checked
from asymkv.paths import cache_dir

FORMAT = "asymkv-zack-basis-1"
TENSORS, MANIFEST = "basis.safetensors", "basis.json"
UNFINISHED = "unfinished.safetensors"  # sums of a calibration that has not come to its end


@dataclass(frozen=True)
class Basis:
    """An orthogonal basis per KV head for queries and keys, and one for values and the output projection.

    Args:
        keys: ``[L, H_kv, D, D]`` fp32; columns by descending energy.
        key_energy: ``[L, H_kv, D]`` fp64, squared singular values of the queries and keys of a head.
        values: ``[L, H_kv, D, D]`` fp32.
        value_energy: ``[L, H_kv, D]`` fp64, of values and output projection.
        model: what they were measured on, from :func:`asymkv.head_scores.model_of`.
        measured: how they were measured: anything that json holds.
        sha256: of the tensors' file; "" before it is saved.
    """

    keys: Tensor
    key_energy: Tensor
    values: Tensor
    value_energy: Tensor
    model: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    @classmethod
    def of_grams(cls, keys: Tensor, values: Tensor, model: dict[str, Any], measured: dict[str, Any]) -> Basis:
        """The basis of Gram matrices ``X^T X``, ``keys`` and ``values [L, H_kv, D, D]`` fp64: their eigenvectors."""
        (key_energy, key_basis), (value_energy, value_basis) = spectrum(keys), spectrum(values)
        return cls(key_basis.float(), key_energy, value_basis.float(), value_energy, model, measured)

    def save(self, folder: str | Path | None = None) -> Path:
        """Writes the folder; None: where methods look for it. The manifest comes last: without it there is no basis.

        Returns:
            The folder.
        """
        target = default_folder(self.model) if folder is None else Path(folder)
        names = ("keys", "key_energy", "values", "value_energy")
        tensors = {name: getattr(self, name).contiguous() for name in names}
        digest = replace_file(target / TENSORS, lambda path: save_file(tensors, path))
        content = {"format": FORMAT, "model": self.model, "measured": self.measured, "tensors_sha256": digest}
        write_checked(target / MANIFEST, content)
        return target


def spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[..., D]``, largest first and never negative, and eigenvectors ``[..., D, D]`` as columns."""
    energy, vectors = torch.linalg.eigh(gram.double())
    return energy.flip(-1).clamp(min=0), vectors.flip(-1)


def default_folder(model: dict[str, Any]) -> Path:
    """Where the basis of a model (as :func:`asymkv.head_scores.model_of` names it) lies in the user's cache folder."""
    return cache_dir() / "zack" / model["weights_sha256"][:16]


def find_folder(source: str | Path | None, model: PreTrainedModel) -> Path:
    """The folder of a model's basis.

    Args:
        source: the folder, one that holds such folders by the first 16 digits of the models' hashes, or None (the
            user's cache folder).
        model: the model.

    Raises:
        ValueError: if there is none, or only an unfinished calibration; says how to make one.
    """
    found = model_of(model)
    own = default_folder(found) if source is None else Path(source)
    if not (own / MANIFEST).is_file() and (own / found["weights_sha256"][:16] / MANIFEST).is_file():
        own = own / found["weights_sha256"][:16]
    if not (own / MANIFEST).is_file():
        name = model.config._name_or_path or "MODEL"
        state = "is not finished" if (own / UNFINISHED).is_file() else "is missing"
        raise ValueError(f"the zack basis of {name!r} at {own} {state}; python scripts/calibrate_zack.py --model "
                         f"{name} --text-file FILE measures it once (and goes on where it was interrupted)")
    return own


def load(source: str | Path | None, model: PreTrainedModel) -> Basis:
    """Reads a model's basis; ``source`` as in :func:`find_folder`.

    Raises:
        ValueError: for a basis that is missing, unfinished, damaged, of another format, or of another model.
    """
    folder = find_folder(source, model)
    content = read_checked(folder / MANIFEST, FORMAT, model, "a basis")
    if not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} is incomplete: {TENSORS} is missing")
    if sha256_file(folder / TENSORS) != content["tensors_sha256"]:
        raise ValueError(f"{folder / TENSORS} is damaged: its sha256 is not the one in {MANIFEST}")
    tensors = load_file(folder / TENSORS)
    return Basis(**tensors, model=content["model"], measured=content["measured"], sha256=content["tensors_sha256"])
