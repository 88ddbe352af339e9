"""Rows of AAGC with chosen centroids, tokens and importance, and what a fold makes of them."""

from __future__ import annotations

import torch
from merging_views import DIM, carried_out, make_view, marked, options
from torch import Tensor

from asymkv.methods.clustering import FOLDED, WORTH


def axis(*numbers: float) -> Tensor:
    """``[1, 1, T, D]``: rows along the first axis."""
    out = torch.zeros(1, 1, len(numbers), DIM, dtype=torch.float64)
    out[0, 0, :, 0] = torch.tensor(numbers, dtype=torch.float64)
    return out


def bank_view(keys, values, *, bank=(), n=None, worth=None, mass=None, budget=None, dtype=torch.float64):
    """A layer and its rows; ``bank``: those that are centroids already, of ``n`` tokens (1) and so much folded
    ``worth``; ``mass``: importance of each row (1)."""
    rows = keys.shape[2]
    layer, view = make_view(rows, keys.shape[1], keys=keys, values=values, budget=budget or rows - 1, n=n,
                            dtype=dtype)  # fmt: skip
    if bank:
        view.statistics[FOLDED] = torch.zeros(*view.valid.shape, 2)
        view.statistics[FOLDED][:, :, list(bank), 0] = view.cardinality[:, :, list(bank)].float()
    if worth is not None:
        view.statistics[WORTH] = torch.as_tensor(worth, dtype=torch.float32).expand(view.valid.shape).clone()
    given = torch.ones(rows) if mass is None else torch.as_tensor(mass, dtype=torch.float32)
    view.evidence["importance"] = given.expand(view.valid.shape)
    return layer, view


def folded(keys, values, drop, *, bank=(), n=None, worth=None, mass=None, budget=None, dtype=torch.float64,
           **settings):  # fmt: skip
    """Storage after row ``drop`` of every head has gone and the rest but the newest was folded."""
    layer, view = bank_view(keys, values, bank=bank, n=n, worth=worth, mass=mass, budget=budget, dtype=dtype)
    method = options("aagc", budget=100, window=0, recent_size=1, **{"num_clusters": 1, **settings})
    return carried_out(method, layer, view, marked(view, drop))
