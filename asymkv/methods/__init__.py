"""The registry of methods: adding one is one file and one line here."""

from __future__ import annotations

from asymkv.methods.asymkv import AsymKV, AsymKVEvict
from asymkv.methods.base import Method
from asymkv.methods.duo_attention import DuoAttention
from asymkv.methods.full import Full
from asymkv.methods.h2o import H2O
from asymkv.methods.headkv import HeadKV
from asymkv.methods.razor import Razor
from asymkv.methods.streaming_llm import StreamingLLM
from asymkv.methods.uncomp import UNComp

METHODS: dict[str, type[Method]] = {
    "asymkv": AsymKV,
    "asymkv_evict": AsymKVEvict,
    "duo_attention": DuoAttention,
    "full": Full,
    "h2o": H2O,
    "headkv": HeadKV,
    "razor": Razor,
    "streaming_llm": StreamingLLM,
    "uncomp": UNComp,
}


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: for an unknown name; lists the registered ones.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; registered: {sorted(METHODS)}")
    return METHODS[name]
