"""Where Triton kernels run: in Triton's interpreter on the CPU (TRITON_INTERPRET=1), or on a CUDA device (-m gpu).

The variable must be set before Triton is first imported, which transformers does; so it belongs above the imports of
``tests/conftest.py`` or into the environment.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from native_build import FLAGS, INCLUDE, LIBRARIES


def skip(reason: str) -> None:
    """Skips, but fails where Triton is required: CI, or ASYMKV_REQUIRE_TRITON=1."""
    required = "1" in (os.environ.get("CI"), os.environ.get("ASYMKV_REQUIRE_TRITON"))
    (pytest.fail if required else pytest.skip)(reason)


@pytest.fixture
def triton_installed() -> None:
    if importlib.util.find_spec("triton") is None:
        skip("Triton is not installed")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, triton_installed: None) -> torch.device:
    """Where the kernels under test run; one process has either the interpreter or the device."""
    from asymkv.ops.triton_launch import available, interpreted

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and torch.cuda.is_available() and not interpreted():
        pytest.skip("kernels run on the device in this process; TRITON_INTERPRET=1 is for those on the CPU")
    if request.param == "cuda" and interpreted():
        pytest.skip("TRITON_INTERPRET=1: kernels run on the CPU in this process")
    if available():
        skip(str(available()))
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cuda_on_cpu(tmp_path_factory):
    """Builds and loads the CUDA kernels as CPU code."""
    if not shutil.which("g++") and os.environ.get("ASYMKV_REQUIRE_EXT") != "1":
        pytest.skip("no C++ compiler on this machine")
    library = tmp_path_factory.mktemp("native") / "cuda_on_cpu.so"
    command = ["g++", "-shared", "-fPIC", "-O1", "-g0", "-Wno-attributes", *FLAGS, f"-I{INCLUDE}"]
    source = Path(__file__).parent / "cuda_on_cpu.cpp"
    links = [f"-L{LIBRARIES}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([*command, str(source), "-o", str(library), *links], check=True)
    torch.ops.load_library(library)
