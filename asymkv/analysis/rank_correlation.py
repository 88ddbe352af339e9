"""Rank correlation of neighbours in the rows of a head's lower triangle, and what it would be in another order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Rows that count as one where a control keeps both a row's scale and the distance.
ROW_BLOCK = 16

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def dense_ranks(x: Floats) -> Ints:
    """Ranks of ``x [n]`` from 0 on, equal values sharing one and none left out: ``[n]``."""
    order = np.argsort(x)
    ordered = x[order]
    ranks = np.empty(len(x), np.int64)
    ranks[order] = np.concatenate(([0], np.cumsum(ordered[1:] != ordered[:-1])))[: len(x)]
    return ranks


def average_ranks(dense: Ints) -> Floats:
    """Ranks from 1 on of values given by their order ``dense [n]`` (integers from 0); equal ones get their mean rank.

    Counting, not sorting: a subset of values that were sorted once is ranked in linear time.

    Returns:
        ``[n]`` fp64.
    """
    counts = np.bincount(dense)
    return (np.cumsum(counts) - (counts - 1) / 2)[dense]


def pearson(x: Floats, y: Floats) -> float:
    """Pearson correlation of ``x [n]`` and ``y [n]`` in fp64; 0 where either is constant or empty, never NaN."""
    if not len(x):
        return 0.0
    x, y = x - x.mean(dtype=np.float64), y - y.mean(dtype=np.float64)
    scale = np.sqrt(x @ x) * np.sqrt(y @ y)
    return float(x @ y / scale) if scale > 0 else 0.0


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's rank correlation of ``x [n]`` and ``y [n]``, ties by their mean rank; 0 where either is constant.

    Raises:
        ValueError: for lengths that differ, or values that are not finite.
    """
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"spearman takes two vectors of one length; found shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("spearman takes finite values; found NaN or infinity")
    return _spearman(dense_ranks(x), dense_ranks(y))


def _spearman(x: Ints, y: Ints) -> float:
    return pearson(average_ranks(x), average_ranks(y))


@dataclass(frozen=True)
class Adjacent:
    """Correlation of ``(m[i, j], m[i, j + 1])`` over a triangle.

    Args:
        spearman: of the pairs, each side ranked by itself.
        pearson_of_ranks: Pearson of the pairs' percentile ranks in the whole triangle, as the paper plots them.
        row_shuffled: the same after each row's entries changed places among themselves: what the rows' scale alone
            gives (the weights of row i average 1 / i, for all its j).
        distance_shuffled: the same after the entries of each distance i - j changed places: what a profile over
            distance alone gives (recency).
        both_shuffled: the same after the entries of each distance changed places within blocks of ``ROW_BLOCK`` rows:
            what scale and profile give together, and likeness over stretches longer than a block. One entry in
            ``ROW_BLOCK`` stays where it was by chance.
    """

    spearman: float
    pearson_of_ranks: float
    row_shuffled: float
    distance_shuffled: float
    both_shuffled: float


class Triangle:
    """Entries ``i >= j >= first`` of a matrix ``[size, size]`` in row order, and the pairs of neighbours among them.

    Args:
        size: tokens.
        first: leading columns left out (attention sinks).
        diagonal: whether ``i = j`` belongs to it. It does for attention; not for cosines, which are 1 there whatever
            the vectors are.
        seed: of the shuffles.

    Raises:
        ValueError: for a triangle without a pair.
    """

    def __init__(self, size: int, *, first: int = 0, diagonal: bool = True, seed: int = 0) -> None:
        rows, columns = np.tril_indices(size, 0 if diagonal else -1)
        kept = columns >= first
        self.size = size
        self.rows, self.columns = rows[kept], columns[kept]
        # Entry p and entry p + 1 are neighbours unless p is the last of its row.
        self.left = np.flatnonzero(self.rows[:-1] == self.rows[1:])
        if not len(self.left):
            raise ValueError(f"no pair of neighbours among {size} tokens without the first {first}; use more tokens")
        random = np.random.default_rng(seed)
        distance = self.rows - self.columns
        groups = (self.rows, distance, self.rows // ROW_BLOCK * size + distance)
        self._shuffles = [_shuffle_within(group, random) for group in groups]

    def entries(self, matrix: Floats) -> Floats:
        """The triangle's entries of ``matrix [size, size]``: ``[n]``."""
        if matrix.shape != (self.size, self.size):
            raise ValueError(f"the triangle is of {self.size} tokens; found a matrix of shape {matrix.shape}")
        return matrix[self.rows, self.columns]

    def adjacent(self, matrix: Floats) -> Adjacent:
        """Rank correlations of neighbours in the rows of ``matrix [size, size]``; 0 where all entries are equal.

        Raises:
            ValueError: for another size, or entries that are not finite.
        """
        entries = self.entries(matrix)
        if not np.isfinite(entries).all():
            raise ValueError("a head's matrix must be finite; found NaN or infinity")
        dense = dense_ranks(entries)
        left, right = self.left, self.left + 1
        ranks = average_ranks(dense)
        orders = [ranks, *(ranks[shuffle] for shuffle in self._shuffles)]
        return Adjacent(_spearman(dense[left], dense[right]), *(pearson(r[left], r[right]) for r in orders))


def _shuffle_within(groups: Ints, random: np.random.Generator) -> Ints:
    """A random permutation ``[n]`` that moves entries only to places of their own group ``[n]``."""
    places = np.argsort(groups, kind="stable")
    permutation = np.empty(len(groups), np.int64)
    permutation[places] = np.argsort(groups + random.random(len(groups)))
    return permutation
