"""Bases of heads on disk: measured once per model, bound to its weights and checked against damage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.files import replace_file, sha256_file
from asymkv.head_scores import model_of, read_checked, write_checked
from asymkv.paths import cache_dir
from asymkv.provenance import note

FORMAT = "asymkv-zack-basis-2"
TENSORS, MANIFEST = "basis.safetensors", "basis.json"
LEAST_ENERGY = 1e-9  # of a direction, as a share of the largest: below it a sum of many squares in fp64 is noise
BASIS = "zack basis"  # what it is called where files are told
UNFINISHED = "unfinished.safetensors"  # sums of a calibration that has not come to its end


@dataclass(frozen=True)
class Directions:
    """What every KV head's rows are multiplied with; a row in r dimensions takes the first r columns.

    Dot products of projected queries and keys stand for those of whole ones, and ``out' outputs^T`` for the attention
    output over whole values. With all columns both are exact.

    Args:
        queries, keys: ``[L, H_kv, D, D]`` fp32; columns by descending energy.
        key_energy: ``[L, H_kv, D]`` fp64, what each column adds to the squared size of what is approximated.
        values, outputs: ``[L, H_kv, D, D]`` fp32.
        value_energy: ``[L, H_kv, D]`` fp64.
    """

    queries: Tensor
    keys: Tensor
    key_energy: Tensor
    values: Tensor
    outputs: Tensor
    value_energy: Tensor

    @classmethod
    def joint(cls, keys: Tensor, values: Tensor) -> Directions:
        """One orthogonal basis for queries and keys, one for values and output projection: the published choice.

        Args:
            keys: Gram matrices ``X^T X [L, H_kv, D, D]`` fp64 of queries and keys together.
            values: of values and output projection together.
        """
        (key_energy, key), (value_energy, value) = spectrum(keys), spectrum(values)
        key, value = key.float(), value.float()
        return cls(key, key, key_energy, value, value, value_energy)

    @classmethod
    def attention(cls, queries: Tensor, keys: Tensor, projection: Tensor, outputs: Tensor) -> Directions:
        """The least error of the products themselves (KQ-SVD, arXiv 2512.05916), as far as attention sees them.

        Keys count by the attention that they receive, and values by the outputs that attention makes of them.

        Args:
            queries: Gram matrices ``[L, H_kv, D, D]`` fp64 of a group's queries.
            keys: of keys, each times the attention it received.
            projection: of the group's slices of the output projection.
            outputs: of attention's outputs over a group's heads.
        """
        (query, key, key_energy), (output, value, value_energy) = factors(queries, keys), factors(projection, outputs)
        return cls(query.float(), key.float(), key_energy, value.float(), output.float(), value_energy)

    def tensors(self) -> dict[str, Tensor]:
        """By name; one that is the same as the one that it meets is left out."""
        twins = {"queries": self.keys, "outputs": self.values}
        return {f.name: getattr(self, f.name).contiguous() for f in fields(self)
                if getattr(self, f.name) is not twins.get(f.name)}  # fmt: skip

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Directions:
        """What :meth:`tensors` gave."""
        return cls(**{"queries": tensors["keys"], "outputs": tensors["values"], **tensors})


OBJECTIVES = ("joint", "attention")  # names of the fields of a Basis


@dataclass(frozen=True)
class Basis:
    """Directions of every KV head by what they were chosen for.

    Args:
        joint: see :meth:`Directions.joint`.
        attention: see :meth:`Directions.attention`.
        model: what they were measured on, from :func:`asymkv.head_scores.model_of`.
        measured: how they were measured: anything that json holds.
        sha256: of the tensors' file; "" before it is saved.
    """

    joint: Directions
    attention: Directions
    model: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def of(self, objective: str) -> Directions:
        """The directions of one of ``OBJECTIVES``."""
        return getattr(self, objective)

    def save(self, folder: str | Path | None = None) -> Path:
        """Writes the folder; None: where methods look for it. The manifest comes last: without it there is no basis.

        Returns:
            The folder.
        """
        target = default_folder(self.model) if folder is None else Path(folder)
        tensors = {f"{kind}.{name}": x for kind in OBJECTIVES for name, x in self.of(kind).tensors().items()}
        digest = replace_file(target / TENSORS, lambda path: save_file(tensors, path))
        content = {"format": FORMAT, "model": self.model, "measured": self.measured, "tensors_sha256": digest}
        write_checked(target / MANIFEST, content)
        return target


def spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[..., D]``, largest first and never negative, and eigenvectors ``[..., D, D]`` as columns."""
    energy, vectors = torch.linalg.eigh(gram.double())
    return energy.flip(-1).clamp(min=0), vectors.flip(-1)


def factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best products of r columns for products of rows: ``X Y^T ~ (X A_r) (Y B_r)^T`` in the Frobenius norm.

    From Gram matrices alone: ``left = X^T X`` and ``right = Y^T Y``, both ``[..., D, D]`` fp64.

    Returns:
        ``A`` and ``B [..., D, D]``, with ``A B^T = I``, and what each column adds to ``|X Y^T|^2 [..., D]``,
        descending. Projected rows of both sides are of equal size in every column.
    """
    (root, inverse), (other, other_inverse) = _roots(left), _roots(right)
    u, size, vt = torch.linalg.svd(root @ other)
    scaled = size.clamp(min=torch.finfo(size.dtype).tiny).sqrt()[..., None, :]
    return inverse @ u * scaled, other_inverse @ vt.mT * scaled, size.square()


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a Gram matrix and its inverse; directions that nothing lies in get a little energy."""
    energy, vectors = torch.linalg.eigh(gram.double())
    most = energy[..., -1:].clamp(min=torch.finfo(energy.dtype).tiny)
    root = torch.maximum(energy, most * LEAST_ENERGY).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


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
    note(BASIS, content["tensors_sha256"])
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in OBJECTIVES}
    for name, tensor in load_file(folder / TENSORS).items():
        kind, _, part = name.partition(".")
        found[kind][part] = tensor
    joint, attention = (Directions.of_tensors(found[kind]) for kind in OBJECTIVES)
    return Basis(joint, attention, content["model"], content["measured"], content["tensors_sha256"])
