"""Cross-entropy and the Kullback-Leibler divergence to a teacher (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def next_tokens(labels: Tensor) -> Tensor:
    """``[B, S]``: what each position predicts; ``IGNORED`` at the last one."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of ``-log p(target)`` over the positions that are not ignored, at least in fp32.

    Args:
        logits: ``[B, t, V]``.
        targets: ``[B, t]``.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return torch.nn.functional.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def divergence_sum(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``sum T^2 KL(softmax(z_T / T) || softmax(z_S / T))`` over the positions that are not ignored.

    Args:
        student, teacher: logits ``[B, t, V]``; no gradient flows to the teacher.
        targets: ``[B, t]``, only to know what is ignored.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    own = (student.to(dtype) / temperature).log_softmax(-1)
    wanted = (teacher.detach().to(dtype) / temperature).log_softmax(-1)
    each = (wanted.exp() * (wanted - own)).sum(-1)
    return temperature**2 * torch.where(targets != IGNORED, each, 0).sum()
