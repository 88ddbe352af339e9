"""Stages of layers from the matrix entropy of their hidden states (UNComp, arXiv 2410.03090)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.analysis.head_entropy import matrix_entropy
from asymkv.analysis.watch import watch_inputs
from asymkv.head_scores import model_of
from asymkv.layer_stages import LayerStages

# Of the authors' code, for entropies summed over samples; their sums (67 to 77 of 32 layers, 83 to 96 of 40, a sample
# giving 1 at most) are those of about 100 samples: percent of a mean.
THRESHOLD = -1.0


def stages_of(entropies: Sequence[float], threshold: float = THRESHOLD) -> list[int]:
    """Stage of each layer: a new one begins where the entropy changes by less than ``threshold`` from the last layer's.

    Args:
        entropies: of the hidden states of each layer, in percent of the most there can be.
        threshold: negative: a drop by more than its size.
    """
    out = [0] * len(entropies)
    for i in range(1, len(entropies)):
        out[i] = out[i - 1] + (entropies[i] - entropies[i - 1] < threshold)
    return out


def measure_stages(
    model: PreTrainedModel,
    samples: Sequence[Tensor],
    *,
    threshold: float = THRESHOLD,
    progress: Callable[[int], object] | None = None,
) -> LayerStages:
    """Stages of a model's layers by what their attention takes in, every eigenvalue counted, averaged over samples.

    Args:
        model: a causal LM of a known family.
        samples: token ids ``[S]`` each, at least 2 tokens.
        threshold: see :func:`stages_of`.
        progress: called with each layer's index, for every sample.

    Raises:
        ValueError: without a sample, or for one that is too short.
    """
    if not samples or min(len(s) for s in samples) < 2:
        raise ValueError(f"entropy needs samples of at least 2 tokens; found lengths {[len(s) for s in samples]}")
    total = torch.zeros(model.config.num_hidden_layers, dtype=torch.double)

    def look(module: Any, hidden: Tensor) -> None:
        total[module.layer_idx] += 100 * matrix_entropy(hidden[0], None).cpu()
        if progress is not None:
            progress(module.layer_idx)

    for ids in samples:
        watch_inputs(model, ids, look)
    entropies = (total / len(samples)).tolist()
    measured = {"tokens": [len(s) for s in samples], "states": "inputs of attention", "entropy_percent": entropies,
                "threshold": threshold, "dtype": str(model.dtype).removeprefix("torch.")}  # fmt: skip
    return LayerStages(stages_of(entropies, threshold), model_of(model), measured)
