"""What the library must know about a model family, and nothing else."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from asymkv.offload import weight_of


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
        q, k = self.project_keys(attention, hidden)
        return q, k, attention.v_proj(hidden).view(shape).transpose(1, 2)

    def project_keys(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys alone, where values come from other weights."""
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        q, k = (p(hidden).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        return q, k

    def output(self, attention: Any, heads: Tensor) -> Tensor:
        """Output projection of the heads' results ``[B, t, H * D]``: ``[B, t, hidden_size]``."""
        return attention.o_proj(heads)

    def output_weight(self, attention: Any) -> Tensor:
        """``[hidden_size, H * D]``."""
        return weight_of(attention.o_proj)

    def weights(self, attention: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weights ``[out, in]`` and biases ``[out]`` of "query", "key", "value" and "output", to be folded.

        Raises:
            ValueError: for projections that are quantised, adapted or offloaded.
        """
        projections = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj,
                       "output": attention.o_proj}  # fmt: skip
        return {name: plain(name, linear) for name, linear in projections.items()}

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

    def most_positions(self, config: Any) -> int | None:
        """How many tokens a sequence can have at all; None where positions have no end."""
        return None

    def logits(self, lm: Any, hidden: Tensor) -> Tensor:
        """Logits of hidden states ``[B, t, hidden_size]``."""
        return lm.lm_head(hidden)

    def check(self, config: Any) -> None:
        """Raises for model configurations that a compressed cache cannot serve.

        Raises:
            ValueError: for layers whose attention is neither full nor over a sliding window.
        """
        other = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if other:
            raise ValueError(f"{self.model_type}: layer types {sorted(other)} cannot run on a compressed cache; "
                             "allowed: full attention in every layer, or sliding windows that no sequence passes")

    def sliding_window(self, config: Any) -> int | None:
        """Tokens that a layer of sliding-window attention sees; None where all attention is full.

        Up to that many tokens it is full attention. Behind them rows outside the window must not be seen, and merged
        rows have no sharp place in or out of it: longer sequences are refused.
        """
        # Qwen2 keeps `sliding_window` beside layer_types that may all be full; Mistral has the former alone.
        types = getattr(config, "layer_types", None)
        slides = types is None or "sliding_attention" in types
        return getattr(config, "sliding_window", None) if slides else None


def plain(name: str, linear: Any, kind: Any = nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, as they are stored, of a projection that is nothing but them.

    Raises:
        ValueError: for one that is quantised, adapted or offloaded.
    """
    weight = getattr(linear, "weight", None)
    if type(linear) is not kind or not linear.weight.is_floating_point() or linear.weight.device.type == "meta":
        stored = f"{weight.dtype} on {weight.device}" if isinstance(weight, Tensor) else "no weight of its own"
        raise ValueError("weights can be folded into plain linear projections that are not offloaded; found for "
                         f"{name} {type(linear).__name__}, {stored}")
    return linear.weight, linear.bias
