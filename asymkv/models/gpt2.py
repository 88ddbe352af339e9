"""GPT-2: learned positions instead of RoPE, one projection for queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from asymkv.models.adapter import FamilyAdapter, plain
from asymkv.offload import weight_of


class NoRotary(nn.Module):
    """A rotary embedding that turns nothing, so that rows merge where they are.

    Args:
        head_dim: size of a key.
        device: of the model.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.zeros(head_dim // 2, device=device))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines 1 and sines 0, ``[M, t, D]`` for positions ``[M, t]``."""
        shape = (*position_ids.shape, 2 * self.inv_freq.shape[0])
        return x.new_ones(shape), x.new_zeros(shape)


class GPT2Adapter(FamilyAdapter):
    """GPT-2's names, and the end of its table of positions."""

    def project(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`FamilyAdapter.project`."""
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        q, k, v = (x.view(shape).transpose(1, 2) for x in attention.c_attn(hidden).split(attention.split_size, dim=2))
        return q, k, v

    def project_keys(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FamilyAdapter.project_keys`; they share their weight with the values."""
        q, k, _ = self.project(attention, hidden)
        return q, k

    def output(self, attention: Any, heads: Tensor) -> Tensor:
        """See :meth:`FamilyAdapter.output`; dropout is the model's own, in training only."""
        return attention.resid_dropout(attention.c_proj(heads))

    def output_weight(self, attention: Any) -> Tensor:
        """See :meth:`FamilyAdapter.output_weight`; GPT-2 stores it transposed."""
        return weight_of(attention.c_proj).T

    def weights(self, attention: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
        """See :meth:`FamilyAdapter.weights`."""
        joint, joint_bias = plain("query, key and value", attention.c_attn, Conv1D)
        weight, bias = plain("output", attention.c_proj, Conv1D)
        assert joint_bias is not None
        parts = zip(joint.split(attention.split_size, dim=1), joint_bias.split(attention.split_size), strict=True)
        names = ("query", "key", "value")
        return {**{name: (w.T, b) for name, (w, b) in zip(names, parts, strict=True)}, "output": (weight.T, bias)}

    def scale(self, attention: Any) -> float:
        """See :meth:`FamilyAdapter.scale`; older transformers divide elsewhere."""
        scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
        return scale / (attention.layer_idx + 1) if attention.scale_attn_by_inverse_layer_idx else scale

    def decoder(self, lm: Any) -> nn.Module:
        """See :meth:`FamilyAdapter.decoder`."""
        return lm.transformer

    def layers(self, lm: Any) -> nn.ModuleList:
        """See :meth:`FamilyAdapter.layers`."""
        return lm.transformer.h

    def rotary(self, lm: Any) -> nn.Module:
        """See :meth:`FamilyAdapter.rotary`: none that turns."""
        return NoRotary(lm.config.hidden_size // lm.config.num_attention_heads, lm.device)

    def position_ids(self, lm: Any, positions: Tensor, present: Tensor) -> Tensor:
        """See :meth:`FamilyAdapter.position_ids`.

        Raises:
            ValueError: for a token behind the model's last learned position.
        """
        most = self.most_positions(lm.config)
        last = int(torch.where(present, positions, 0).max()) if positions.numel() else 0
        if last >= most:
            raise ValueError(f"this {self.model_type} model has {most} learned positions; found a token at position "
                             f"{last}: rows can be given up, positions cannot")
        return positions.clamp(max=most - 1)

    def most_positions(self, config: Any) -> int:
        """See :meth:`FamilyAdapter.most_positions`: the table's."""
        return config.max_position_embeddings

    def check(self, config: Any) -> None:
        """Raises ValueError for a decoder that attends to an encoder too."""
        super().check(config)
        if config.add_cross_attention:
            raise ValueError(f"{self.model_type}: add_cross_attention=True cannot run on a compressed cache; allowed: "
                             "False")


ADAPTER = GPT2Adapter(
    model_type="gpt2",
    module="transformers.models.gpt2.modeling_gpt2",
    attention="GPT2Attention",
    causal_lm="GPT2LMHeadModel",
)
