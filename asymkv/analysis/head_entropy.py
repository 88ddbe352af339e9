"""Truncated matrix entropy of heads (UNComp, arXiv 2410.03090)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.analysis.watch import kv_heads, watch
from asymkv.head_scores import HeadScores, model_of

TOP = 32  # eigenvalues that count, of the authors' code
JITTER = 1e-10


def spectrum_entropy(eigenvalues: Tensor, top: int | None = None) -> Tensor:
    """``-sum over the top largest of x ln x`` of eigenvalues ``[..., d]`` that sum to 1; None = of all."""
    largest = eigenvalues.sort(dim=-1, descending=True).values[..., :top].clamp(min=0)
    return -torch.xlogy(largest, largest).sum(-1)


def matrix_entropy(rows: Tensor, top: int | None = TOP) -> Tensor:
    """Entropy of the directions of ``rows [..., n, d]``, divided by ``ln d``; in fp64.

    Rows are centred and normalised; the entropy is that of the spectrum of their second-moment matrix with trace 1.
    0 = all on one line, 1 (with ``top=None``) = every direction alike. The same under a common rotation, not under a
    scaling of single rows.

    Returns:
        ``[...]`` fp64.
    """
    x = rows.double()
    x = x - x.mean(-2, keepdim=True)
    x = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    moment = x.transpose(-1, -2) @ x / x.shape[-2]
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    moment = moment / trace.clamp(min=torch.finfo(x.dtype).tiny) + JITTER * identity
    return spectrum_entropy(torch.linalg.eigvalsh(moment), top) / math.log(x.shape[-1])


def entropy_scores(
    model: PreTrainedModel,
    samples: Sequence[Tensor],
    *,
    top: int = TOP,
    progress: Callable[[int], object] | None = None,
) -> HeadScores:
    """Matrix entropy of the queries of every KV head, averaged over the query heads of its group and over samples.

    The authors let samples vote on the upper half of the heads; the mean orders heads without ties.

    Args:
        model: a causal LM of a known family.
        samples: token ids ``[S]`` each, at least 2 tokens.
        top: eigenvalues that count.
        progress: called with each layer's index, for every sample.

    Raises:
        ValueError: without a sample, or for one that is too short.
    """
    if not samples or min(len(s) for s in samples) < 2:
        raise ValueError(f"entropy needs samples of at least 2 tokens; found lengths {[len(s) for s in samples]}")
    total = torch.zeros(model.config.num_hidden_layers, kv_heads(model), dtype=torch.double)

    def look(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        total[layer] += matrix_entropy(q, top).view(k.shape[0], -1).mean(1).cpu()
        if progress is not None:
            progress(layer)

    for ids in samples:
        watch(model, ids, look)
    measured = {"tokens": [len(s) for s in samples], "top": top, "states": "queries after RoPE", "group": "mean",
                "dtype": str(model.dtype).removeprefix("torch.")}  # fmt: skip
    return HeadScores("entropy", (total / len(samples)).tolist(), model_of(model), measured)
