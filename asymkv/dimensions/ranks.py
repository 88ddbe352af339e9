"""How many dimensions each head keeps: by energy under a budget for the whole model, the same everywhere, or given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from asymkv.checks import check_choice, check_integer

# "layer": one number per layer; "energy": per head; "uniform": the same everywhere.
POLICIES = ("layer", "energy", "uniform")
PARTS = ("keys", "values")


def check_ranks(ranks: Any) -> None:
    """Whether a setting names a policy, or gives ranks.

    Raises:
        ValueError: if it does neither; says what is allowed.
    """
    parts = ranks if isinstance(ranks, Mapping) else {"both": ranks}
    if isinstance(ranks, Mapping) and set(ranks) != set(PARTS):
        raise ValueError(f"ranks of dimensions='zack' by part must name {' and '.join(PARTS)}; found {sorted(ranks)}")
    if isinstance(ranks, str):
        return check_choice("ranks of dimensions='zack'", ranks, POLICIES)
    for given in parts.values():
        for layer in given if _listed(given) else [given]:
            for rank in layer if _listed(layer) else [layer]:
                check_integer("a rank of dimensions='zack'", rank, 1)


def given_ranks(ranks: Any, part: str, shape: Sequence[int]) -> Tensor:
    """Ranks of ``part`` that :func:`check_ranks` accepted, ``[L, H_kv]`` int64 for energies of shape ``[L, H_kv, D]``.

    Raises:
        ValueError: for other numbers of layers or heads than the model's, or a rank above D.
    """
    layers, heads, size = shape
    given = ranks[part] if isinstance(ranks, Mapping) else ranks
    by_layer = list(given) if _listed(given) else [given] * layers
    if len(by_layer) != layers:
        raise ValueError(f"ranks of dimensions='zack' for {part} are of {len(by_layer)} layers; the model has {layers}")
    by_head = [list(own) if _listed(own) else [own] * heads for own in by_layer]
    for layer, own in enumerate(by_head):
        if len(own) != heads:
            raise ValueError(f"ranks of dimensions='zack' for {part} of layer {layer} are of {len(own)} heads; the "
                             f"model has {heads} KV heads")
        if max(own) > size:
            raise ValueError(f"ranks of dimensions='zack' for {part} of layer {layer}: {max(own)} is above the head "
                             f"size {size}; allowed: 1 to {size}")
    return torch.tensor(by_head)


def _listed(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)


def choose_ranks(energy: Tensor, ratio: float, policy: str, *, multiple: int = 8, least: int = 8) -> Tensor:
    """Dimensions that each head keeps, in whole blocks of ``multiple``.

    By energy, heads (or layers, which then have one rank for all their heads, by the mean of their shares) are given
    ``least`` dimensions each, and the rest of ``ratio * L * H_kv * D`` goes block by block to where it gains the
    largest share of a head's energy: the sum is the budget, rounded down to whole blocks of every unit. Uniform ranks
    are ``ratio * D``, rounded up to a block.

    Args:
        energy: ``[L, H_kv, D]`` squared singular values of each head, largest first.
        ratio: share of dimensions kept, in (0, 1].
        policy: one of ``POLICIES``.
        multiple: dimensions of a block; divides D.
        least: dimensions that every head keeps.

    Returns:
        ``[L, H_kv]`` int64, from 1 to D.

    Raises:
        ValueError: if blocks do not fit the head, or the budget is below the least ranks.
    """
    layers, heads, size = energy.shape
    if size % multiple:
        allowed = [n for n in range(2, size + 1, 2) if size % n == 0]
        raise ValueError(f"dimensions: multiple={multiple} does not divide the head size {size}; allowed: {allowed}")
    if least > size:
        raise ValueError(f"dimensions: least={least} is above the head size {size}; allowed: 1 to {size}")
    floor = -(-least // multiple)
    if policy == "uniform":
        blocks = max(math.ceil(Fraction(str(ratio)) * size / multiple), floor)
        return torch.full((layers, heads), blocks * multiple)
    share = energy.double().clamp(min=0)
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    units = share.mean(1) if policy == "layer" else share.flatten(0, 1)
    ranks = fill(units.view(len(units), -1, multiple).sum(-1), Fraction(str(ratio)), floor) * multiple
    return ranks[:, None].repeat(1, heads) if policy == "layer" else ranks.view(layers, heads)


def fill(gain: Tensor, ratio: Fraction, floor: int) -> Tensor:
    """Blocks that each unit keeps, ``[U]`` int64, summing to ``floor(ratio * U * N)``.

    Args:
        gain: ``[U, N]``, what each block gains, by descending value along N.
        ratio: share of all blocks.
        floor: blocks that every unit keeps.

    Raises:
        ValueError: if that is more than there are to give.
    """
    units, blocks = gain.shape
    total = math.floor(ratio * units * blocks)
    if total < units * floor:
        raise ValueError(f"dimensions: ratio={float(ratio):g} leaves {total} blocks of dimensions for {units} heads or "
                         f"layers, which keep {floor} of {blocks} each at least; raise ratio, or lower least or "
                         "multiple")
    # Rounding must not make a later block dearer than an earlier one; of equals the earlier block goes first.
    free = gain.cummin(-1).values[:, floor:].T.reshape(-1)
    taken = free.argsort(descending=True, stable=True)[: total - units * floor]
    return floor + torch.bincount(taken % units, minlength=units)
