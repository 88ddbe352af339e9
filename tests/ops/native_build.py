"""Compiler flags of the extension, for tests that build parts of it."""

from pathlib import Path

import torch

INCLUDE = Path(torch.__file__).parent / "include"
LIBRARIES = Path(torch.__file__).parent / "lib"
FLAGS = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
