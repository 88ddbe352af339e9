"""The model and prompt of kvpress_positions.json: weights that no version of transformers draws for us."""

from __future__ import annotations

import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor, nn

TOKENIZER = tiny_tokenizer
TOKENS = 301


def model() -> nn.Module:
    """A Llama of 4 layers, 6 query and 3 KV heads, fp32."""
    lm = tiny_model(
        num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3, hidden_size=96, vocab_size=512
    )
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in sorted(lm.named_parameters()):
            if p.ndim > 1:
                std = 0.3 if "q_proj" in name or "k_proj" in name else 0.15
                p.copy_(torch.randn(p.shape, generator=draw) * std)
            else:
                p.fill_(1.0 if "norm" in name else 0.01)
    return lm


def ids() -> Tensor:
    """``[1, 301]``, no token twice: equal tokens would tie, and kvpress breaks ties as torch.topk happens to."""
    return 3 + torch.randperm(500, generator=torch.Generator().manual_seed(12))[None, :TOKENS]
