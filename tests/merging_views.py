"""Rows with chosen keys, values and attention, for the tests of merging methods."""

from __future__ import annotations

import functools

import torch
from tiny_models import tiny_model

import asymkv
from asymkv.layer import CompressedLayer
from asymkv.plan import execute
from asymkv.rope import Rope

DIM = 16


@functools.cache
def rope() -> Rope:
    return Rope(tiny_model().model.rotary_emb)


def options(name: str, sink: int = 0, window: int = 1, **settings):
    """A method with its protected sizes."""
    return asymkv.CompressionConfig(name, sink_size=sink, window_size=window, **settings).options


def make_view(rows=24, heads=2, batch=1, budget=14, *, keys=None, values=None, mass=None, n=None, seed=0,
              dtype=torch.float64):  # fmt: skip
    """A layer and its rows; what is not given is random. ``keys``, ``values``: ``[B, H, T, D]``, ``mass``: ``[T]``."""
    torch.manual_seed(seed)
    layer = CompressedLayer()
    shape = (batch, heads, rows, DIM)
    layer.append(torch.randn(shape, dtype=dtype) if keys is None else keys.to(dtype),
                 torch.randn(shape, dtype=dtype) if values is None else values.to(dtype))  # fmt: skip
    layer.storage.add_column("mass", (), torch.float32)
    weight = torch.rand(batch, heads, rows) if mass is None else torch.as_tensor(mass).float().expand(batch, heads, -1)
    layer.storage.write("mass", weight.flatten(0, 1))
    if n is not None:
        layer.storage.write("cardinality", torch.as_tensor(n).int().expand(batch, heads, -1).flatten(0, 1))
        layer.storage.merged = True
    view = layer.view(rope(), 0.25)
    view.budget = torch.full((batch, heads), budget).clamp(max=rows)
    return layer, view


def scalars(*values):
    """``[1, 1, T, D]``: rows that hold one number in every dimension."""
    return torch.tensor(values, dtype=torch.float64)[None, None, :, None].expand(1, 1, -1, DIM).clone()


def directions(*cosines):
    """``[1, 1, T, D]``: the first axis, then unit vectors at the given cosines to it, each in a plane of its own."""
    out = torch.zeros(1, 1, len(cosines) + 1, DIM, dtype=torch.float64)
    out[..., 0, 0] = 1
    for i, c in enumerate(cosines, 1):
        out[..., i, 0], out[..., i, i] = c, (1 - c * c) ** 0.5
    return out


def marked(view, *rows):
    """``[B, H_kv, T]`` bool: the given rows of every head leave."""
    chosen = torch.zeros_like(view.valid)
    chosen[..., list(rows)] = True
    return chosen


def carried_out(method, layer, view, chosen):
    """Storage after the method has given up the chosen rows."""
    return execute(method.carry_out(view, chosen), view, layer.storage, "original")


def planned(method, layer, view):
    """Storage after the method has brought every head to its budget."""
    return execute(method.plan(view), view, layer.storage, "original")
