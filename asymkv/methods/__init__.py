"""The registry of methods: adding one is one file and one line here."""

from __future__ import annotations

from asymkv.methods.aagc import AAGC
from asymkv.methods.asymkv import AsymKV
from asymkv.methods.asymkv_controls import AsymKVEvict, AsymKVSymmetric
from asymkv.methods.base import Method
from asymkv.methods.cam import CaM
from asymkv.methods.composed import ChunkKV, CriticalKV
from asymkv.methods.d2o import D2O
from asymkv.methods.duo_attention import DuoAttention
from asymkv.methods.echo import Echo
from asymkv.methods.expected_attention import ExpectedAttention
from asymkv.methods.full import Full
from asymkv.methods.gate import GateMethod
from asymkv.methods.h2o import H2O
from asymkv.methods.headkv import HeadKV
from asymkv.methods.keys import KeyDiff, Knorm
from asymkv.methods.kvmerger import KVMerger
from asymkv.methods.kvzip import KVzip
from asymkv.methods.razor import Razor
from asymkv.methods.snapkv import AdaKV, DynamicKV, PyramidKV, SnapKV
from asymkv.methods.streaming_llm import StreamingLLM
from asymkv.methods.tova import TOVA
from asymkv.methods.uncomp import UNComp
from asymkv.methods.value_merge import ValueMerge
from asymkv.methods.zack import Zack

METHODS: dict[str, type[Method]] = {
    "aagc": AAGC,
    "adakv": AdaKV,
    "asymkv": AsymKV,
    "asymkv_evict": AsymKVEvict,
    "asymkv_symmetric": AsymKVSymmetric,
    "cam": CaM,
    "chunkkv": ChunkKV,
    "criticalkv": CriticalKV,
    "d2o": D2O,
    "duo_attention": DuoAttention,
    "dynamic_kv": DynamicKV,
    "echo": Echo,
    "expected_attention": ExpectedAttention,
    "full": Full,
    "gate": GateMethod,
    "h2o": H2O,
    "headkv": HeadKV,
    "keydiff": KeyDiff,
    "knorm": Knorm,
    "kvmerger": KVMerger,
    "kvzip": KVzip,
    "pyramidkv": PyramidKV,
    "razor": Razor,
    "snapkv": SnapKV,
    "streaming_llm": StreamingLLM,
    "tova": TOVA,
    "uncomp": UNComp,
    "value_merge": ValueMerge,
    "zack": Zack,
}


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: for an unknown name; lists the registered ones.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; registered: {sorted(METHODS)}")
    return METHODS[name]
