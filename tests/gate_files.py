"""Random gates of the tiny models, written once per process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import torch
from tiny_models import FAMILIES, tiny_model
from torch import nn
from zack_bases import even_model

from asymkv.gates.gate import Gate, default_path
from asymkv.head_scores import model_of


def random_gate(model: nn.Module, *, hidden: int = 8, seed: int = 0, lengths: bool = True) -> Gate:
    """Scores that spread over a few units, by heads and by the context's length."""
    draw = torch.Generator().manual_seed(seed)
    bound, config = model_of(model), model.config
    heads = (bound["layers"], bound["kv_heads"])
    size = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    weights = {
        "mean": torch.zeros(*heads, size), "scale": torch.ones(*heads, size),
        "weight_in": torch.randn(*heads, size, hidden, generator=draw).bfloat16().float(),
        "bias_in": torch.randn(*heads, hidden, generator=draw),
        "weight_out": torch.randn(*heads, hidden, generator=draw),
        "bias_out": torch.randn(*heads, generator=draw) - 5,
    }  # fmt: skip
    if lengths:
        weights["weight_length"] = torch.randn(*heads, hidden, generator=draw)
        weights["lengths"] = torch.tensor([60.0, 1000.0]).repeat(*heads, 1)
    return Gate(weights, bound, {"seed": seed})


def _written() -> str:
    folder = tempfile.mkdtemp(prefix="gates-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for model in [*map(tiny_model, FAMILIES), even_model()]:
        gate = random_gate(model)
        gate.save(Path(folder) / default_path(gate.model).name)
    return folder


GATES = _written()
