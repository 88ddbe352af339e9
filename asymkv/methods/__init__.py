"""The registry of methods: adding one is one file and one line here."""

from __future__ import annotations

from asymkv.methods.asymkv import AsymKV, AsymKVEvict
from asymkv.methods.base import Method
from asymkv.methods.full import Full
from asymkv.methods.h2o import H2O
from asymkv.methods.kvzip import KVzip
from asymkv.methods.streaming_llm import StreamingLLM

METHODS: dict[str, type[Method]] = {
    "asymkv": AsymKV,
    "asymkv_evict": AsymKVEvict,
    "full": Full,
    "h2o": H2O,
    "kvzip": KVzip,
    "streaming_llm": StreamingLLM,
}


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: for an unknown name; lists the registered ones.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; registered: {sorted(METHODS)}")
    return METHODS[name]
