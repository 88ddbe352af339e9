"""asymkv: compressed KV caches for transformers, by merging, eviction and everything between."""

from asymkv.cache import CompressedCache
from asymkv.compress import ask, compress, compress_many
from asymkv.config import CompressionConfig
from asymkv.ops import lma_attention
from asymkv.patch import (
    PatchHandle,
    replace,
    replace_gpt2_asymkv,
    replace_llama_asymkv,
    replace_mistral_asymkv,
    replace_qwen2_asymkv,
    restore,
)

__version__ = "0.1.0"

__all__ = [
    "CompressedCache",
    "CompressionConfig",
    "PatchHandle",
    "__version__",
    "ask",
    "compress",
    "compress_many",
    "lma_attention",
    "replace",
    "replace_gpt2_asymkv",
    "replace_llama_asymkv",
    "replace_mistral_asymkv",
    "replace_qwen2_asymkv",
    "restore",
]
