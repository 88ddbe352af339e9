"""Guards of every test: uninitialised memory is NaN, and no patch outlives its test."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton, as transformers does: kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import asymkv.patch  # noqa: E402
from asymkv.models import families, get_adapter  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Whoever reads memory it never wrote gets NaN."""
    real = torch.empty

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() and out.device.type != "meta" else out

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(autouse=True)
def same_seed():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_patch_leaks():
    """Classes are the originals before and after each test."""
    originals = {f: (get_adapter(f).attention_class().forward, get_adapter(f).causal_lm_class().forward)
                 for f in families()}  # fmt: skip
    yield
    asymkv.restore()
    for family, found in originals.items():
        adapter = get_adapter(family)
        assert (adapter.attention_class().forward, adapter.causal_lm_class().forward) == found
    assert not asymkv.patch._active
