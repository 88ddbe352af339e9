"""CUDA code is compiled wherever there is a compiler for it, GPU or not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from native_build import FLAGS, INCLUDE

CSRC = Path(__file__).parents[2] / "csrc"
REQUIRED = os.environ.get("ASYMKV_REQUIRE_EXT") == "1"


@pytest.mark.parametrize("source", sorted(p.name for p in (CSRC / "cuda").glob("*.cu")))
@pytest.mark.skipif(not shutil.which("nvcc") and not REQUIRED, reason="no nvcc on this machine")
def test_compiles_for_hopper_against_this_torch(source, tmp_path):
    command = ["nvcc", "-c", "-arch=sm_90", "-O0", *FLAGS, f"-I{INCLUDE}", "-Xcompiler", "-fPIC"]
    out = tmp_path / "object.o"
    done = subprocess.run([*command, str(CSRC / "cuda" / source), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 10_000


def test_every_schema_has_a_fake_and_a_cpu_kernel():
    extension = pytest.importorskip("asymkv._C")
    assert extension is not None
    for name in ("ragged_append_", "compaction_layout", "ragged_compact", "lma_decode", "attention_mass",
                 "key_curvature"):  # fmt: skip
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"asymkv::{name}", "CPU")
