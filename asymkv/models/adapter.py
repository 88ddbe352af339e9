"""What the library must know about a model family, and nothing else."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class FamilyAdapter:
    """Names of a family's classes in transformers, and the few places where families could differ.

    Args:
        model_type: ``config.model_type``.
        module: import path of the modeling file.
        attention: class name of the attention module.
        causal_lm: class name of the causal language model.
    """

    model_type: str
    module: str
    attention: str
    causal_lm: str

    def attention_class(self) -> type[nn.Module]:
        """The attention class of transformers (imported on demand)."""
        return getattr(importlib.import_module(self.module), self.attention)

    def causal_lm_class(self) -> type[nn.Module]:
        """The causal LM class of transformers (imported on demand)."""
        return getattr(importlib.import_module(self.module), self.causal_lm)

    def project(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before RoPE: ``[B, H, t, D]``, ``[B, H_kv, t, D]``, ``[B, H_kv, t, D]``."""
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(hidden).view(shape).transpose(1, 2) for p in projections)
        return q, k, v

    def output(self, attention: Any, heads: Tensor) -> Tensor:
        """Output projection of the heads' results ``[B, t, H * D]``: ``[B, t, hidden_size]``."""
        return attention.o_proj(heads)

    def output_weight(self, attention: Any) -> Tensor:
        """``[hidden_size, H * D]``."""
        return attention.o_proj.weight

    def key_weight(self, attention: Any) -> Tensor:
        """The weight that keys are projected by, to know a model again."""
        return attention.k_proj.weight

    def scale(self, attention: Any) -> float:
        """Factor of the logits."""
        return attention.scaling

    def decoder(self, lm: Any) -> nn.Module:
        """The decoder stack: returns hidden states after the final norm."""
        return lm.model

    def layers(self, lm: Any) -> nn.ModuleList:
        """The decoder's layers, which take hidden states first."""
        return lm.model.layers

    def rotary(self, lm: Any) -> nn.Module:
        """The rotary embedding module."""
        return lm.model.rotary_emb

    def position_ids(self, lm: Any, positions: Tensor, present: Tensor) -> Tensor:
        """What the decoder takes as ``position_ids``.

        Args:
            positions: ``[B, t]`` own-token positions.
            present: ``[B, t]`` bool, False where a column is no token.
        """
        return positions

    def logits(self, lm: Any, hidden: Tensor) -> Tensor:
        """Logits of hidden states ``[B, t, hidden_size]``."""
        return lm.lm_head(hidden)

    def check(self, config: Any) -> None:
        """Raises for model configurations that a compressed cache cannot serve.

        Raises:
            ValueError: for sliding-window attention: rows outside the window must not be seen, and merged rows have
                no sharp place in or out of it.
        """
        sliding = [t for t in getattr(config, "layer_types", None) or [] if t != "full_attention"]
        # Qwen2 keeps `sliding_window` beside layer_types that may all be full; Mistral has the former alone.
        has_types = getattr(config, "layer_types", None) is not None
        window = None if has_types else getattr(config, "sliding_window", None)
        if sliding or window is not None:
            found = f"layer types {sorted(set(sliding))}" if sliding else f"sliding_window={window}"
            raise ValueError(
                f"{self.model_type}: {found} cannot run on a compressed cache; allowed: full attention in every layer "
                "(set sliding_window=None, or use_sliding_window=False, if the model was trained for it)"
            )
