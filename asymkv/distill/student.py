"""A student that reads text on a compressed cache, taught by the same model on the full one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from asymkv.attention import settle
from asymkv.checks import check_choice, check_integer, check_number
from asymkv.config import CompressionConfig
from asymkv.distill.functional import DifferentiableCache, check_differentiable
from asymkv.distill.losses import IGNORED, cross_entropy_sum, divergence_sum, next_tokens
from asymkv.models import get_adapter
from asymkv.models._compat import checkpoints_activations
from asymkv.patch import replace
from asymkv.prefill import decode, make_step

POSITIONS = ("all", "compressed")
CHECKPOINTED = (
    "gradient_checkpointing_enable() makes transformers drop the cache, and with it the compression; call "
    "gradient_checkpointing_disable() and use the student's own: checkpoint_chunks=True"
)


@dataclass(frozen=True)
class DistillSettings:
    """How the student is taught.

    Args:
        temperature: T of the divergence.
        distillation_weight: lambda, the weight of ``T^2 KL`` beside the cross-entropy; 0 = no teacher. The public code
            sums over a sequence's positions where this is a mean: its lambda is this one over the length.
        bptt_chunks: a gradient flows back through so many chunks; 1 = never through the cache.
        checkpoint_chunks: forget a chunk's activations and compute them again for the backward pass.
        distill_positions: where the divergence counts: "all", or only after the first compaction ("compressed").
    """

    temperature: float = 2.0
    distillation_weight: float = 0.5
    bptt_chunks: int = 2
    checkpoint_chunks: bool = False
    distill_positions: str = "all"

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 1e-6)
        check_number("distillation_weight", self.distillation_weight, 0)
        check_integer("bptt_chunks", self.bptt_chunks, 1)
        check_choice("distill_positions", self.distill_positions, POSITIONS)


class Student(nn.Module):
    """Wraps a causal LM, whose attention it patches until :meth:`close`.

    Dropout stays off, in the student as in the teacher: its noise would be divergence.

    Args:
        model: a causal LM of a supported family, or a peft model around one.
        config: the compression; its method must be one that can be trained through.
        settings: how it is taught.
        teacher: the model to learn from, frozen, on the full cache; None: the student's own weights with its adapters
            switched off.

    Raises:
        ValueError: for a method that cannot be trained through, a missing teacher, or transformers' own gradient
            checkpointing.
    """

    def __init__(
        self,
        model: Any,
        config: CompressionConfig,
        settings: DistillSettings | None = None,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        check_differentiable(config)
        self.settings = settings or DistillSettings()
        self.model = model
        self.config = config
        # Not registered as a module: it is neither trained nor saved, nor synchronised between processes.
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]
        if self.settings.distillation_weight and teacher is None and not hasattr(model, "disable_adapter"):
            raise ValueError("distillation_weight > 0 needs a teacher: a frozen copy of the model, or a peft model, "
                             "whose adapters can be switched off")
        self.adapter = get_adapter(self.lm.config.model_type)
        self.compactions = 0  # of the last forward
        self._check_checkpointing()
        self.eval()
        self._handle = replace(self.lm.config.model_type, config, model=self.lm)

    @property
    def lm(self) -> PreTrainedModel:
        """The causal LM, without adapters around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def train(self, mode: bool = True) -> Student:
        """Modules stay in evaluation mode: see the class."""
        return super().train(False)

    def close(self) -> None:
        """Takes the patch off the model."""
        self._handle.restore()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Loss of blocks of text, read chunk by chunk on the compressed cache.

        Args:
            input_ids: ``[B, S]`` without padding.
            labels: ``[B, S]``, as ``input_ids`` but for positions that are ignored (-100); None = ``input_ids``.

        Returns:
            ``loss`` (cross-entropy + lambda T^2 KL, means over the positions that count), ``cross_entropy`` and
            ``divergence`` (T^2 KL), scalars.
        """
        self._check_checkpointing()
        targets = next_tokens(input_ids if labels is None else labels)
        taught = self._teacher_states(input_ids) if self.settings.distillation_weight else None
        cache: Any = DifferentiableCache.for_model(self.config, self.lm)
        cache.expect_prompt([input_ids.shape[1]] * input_ids.shape[0])
        sums, size = [torch.zeros((), device=input_ids.device)] * 3, self.config.chunk or input_ids.shape[1]
        for number, begin in enumerate(range(0, input_ids.shape[1], size)):
            if number and number % self.settings.bptt_chunks == 0:
                cache = cache.detached()
            part = slice(begin, begin + size)
            cache, *new = self._maybe_checkpointed(
                cache, input_ids[:, part], targets[:, part], None if taught is None else taught[:, part]
            )
            sums = [a + b for a, b in zip(sums, new, strict=True)]
        self.compactions = cache.compactions
        entropy = sums[0] / (targets != IGNORED).sum().clamp(min=1)
        divergence = sums[1] / sums[2].clamp(min=1)
        loss = entropy + self.settings.distillation_weight * divergence
        return {"loss": loss, "cross_entropy": entropy.detach(), "divergence": divergence.detach()}

    def _maybe_checkpointed(self, *chunk: Any) -> tuple[Any, ...]:
        if self.settings.checkpoint_chunks and torch.is_grad_enabled():
            return checkpoint(self._chunk, *chunk, use_reentrant=False)
        return self._chunk(*chunk)

    def _chunk(
        self, cache: DifferentiableCache, ids: Tensor, targets: Tensor, taught: Tensor | None
    ) -> tuple[DifferentiableCache, Tensor, Tensor, Tensor]:
        """One chunk on a fork of the cache, so that it can be computed again.

        Returns:
            The fork, the sums of cross-entropy and divergence, and the positions that the latter counts.
        """
        cache, compressed = cache.fork(), cache.compactions > 0
        logits = self.adapter.logits(self.lm, self._states(cache, ids))
        entropy = cross_entropy_sum(logits, targets)
        none = torch.zeros((), device=ids.device)
        if taught is None or (self.settings.distill_positions == "compressed" and not compressed):
            return cache, entropy, none, none
        with torch.no_grad(), self._teaching() as teacher:
            wanted = self.adapter.logits(teacher, taught)
        divergence = divergence_sum(logits, wanted, targets, self.settings.temperature)
        return cache, entropy, divergence, (targets != IGNORED).sum()

    def _states(self, cache: DifferentiableCache, ids: Tensor) -> Tensor:
        """Hidden states ``[B, t, hidden_size]`` of a chunk; the cache takes its rows and is compacted."""
        counts = [ids.shape[1]] * ids.shape[0]
        prompt = cache.count_prompt(counts)
        positions, tables = cache.next_positions(counts, ids.device, self.lm.dtype)
        step = make_step(cache, counts, positions, tables, prompt)
        out = decode(self.adapter, self.lm, cache, step, {"input_ids": ids})
        with torch.autocast(ids.device.type, enabled=False):
            settle(cache, step)
        cache.step = None
        cache.compactions += step.compacted
        return out.last_hidden_state

    # -- teacher -----------------------------------------------------------------------------------------------------
    def _teaching(self) -> AbstractContextManager[Any]:
        """The teaching LM: another model, or this one with its adapters off."""
        if self._teacher:
            return nullcontext(self._teacher[0])
        return _Switched(self.model, self.lm)

    def _teacher_states(self, ids: Tensor) -> Tensor:
        """``[B, S, hidden_size]`` on the full cache; logits, which are larger, are made chunk by chunk."""
        with torch.no_grad(), self._teaching() as teacher:
            return self.adapter.decoder(teacher)(input_ids=ids, use_cache=False).last_hidden_state

    def move_teacher(self, device: torch.device) -> None:
        """Moves a separate teacher, which is not part of the module."""
        for teacher in self._teacher:
            teacher.to(device)

    # -- weights -----------------------------------------------------------------------------------------------------
    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _check_checkpointing(self) -> None:
        if checkpoints_activations(self.lm):
            raise ValueError(CHECKPOINTED)


class _Switched:
    """The LM of a peft model without its adapters, for a while."""

    def __init__(self, model: Any, lm: PreTrainedModel) -> None:
        self.off, self.lm = model.disable_adapter(), lm

    def __enter__(self) -> PreTrainedModel:
        self.off.__enter__()
        return self.lm

    def __exit__(self, *error: Any) -> None:
        self.off.__exit__(*error)
