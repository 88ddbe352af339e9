"""Fixtures: a byte-level tokenizer and a random two-layer Llama; no test here needs a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from byte_tokenizers import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from asymkv.longbench.models import ModelSpec


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Builds a byte tokenizer; ``adds_bos=True`` for one that begins every text with BOS."""
    return byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def spec() -> ModelSpec:
    return ModelSpec(name="tiny", path="tiny", max_length=10_000)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Llama with the byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(42)
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
