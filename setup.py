"""Packages the library with its settings folder, and builds the C++/CUDA extension where that is possible.

The extension uses torch's stable ABI: one binary for many versions of torch and Python. It is built on the CPU when
torch and a C++ compiler are there (so: ``pip install --no-build-isolation``), and for CUDA when torch is a CUDA build
and nvcc is found. Without them the library is pure Python, and a warning says so; ``ASYMKV_REQUIRE_EXT=1`` turns the
warning into an error.
"""

import os
import sys
import warnings
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SETTINGS = [p.relative_to(ROOT) for p in sorted((ROOT / "configs").rglob("*")) if p.is_dir()]
# configs/ of the checkout becomes asymkv/configs of an installation.
CONFIG_PACKAGES = {"asymkv.configs": "configs"}
CONFIG_PACKAGES |= {"asymkv." + ".".join(p.parts): str(p) for p in SETTINGS}

TARGET_TORCH = "0x020a000000000000"  # the oldest torch that the binary runs on: 2.10
MACROS = [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", "-DPy_LIMITED_API=0x030A0000"]
CXX_FLAGS = [*MACROS, "-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
             "-fno-trapping-math", "-Wall", "-Wno-psabi", "-Wno-attributes"]  # fmt: skip
NVCC_FLAGS = [*MACROS, "-O3", "-std=c++20", "-DUSE_CUDA", "--threads=4"]
CUDA_ARCHS = ("80", "86", "89", "90")
REQUIRED = os.environ.get("ASYMKV_REQUIRE_EXT") == "1"


def give_up(why: str) -> None:
    """Goes on without the extension, or stops if it is required."""
    if REQUIRED:
        raise SystemExit(f"ASYMKV_REQUIRE_EXT=1, but the extension cannot be built: {why}")
    warnings.warn(f"asymkv is installed without its C++ extension (slower on the CPU): {why}", stacklevel=2)


class OptionalBuild(build_ext):
    """Builds with torch's own command; a failure leaves a pure Python package."""

    def run(self) -> None:
        """Replaces what torch's command would do after a failure: nothing."""
        try:
            super().run()
        except (Exception, SystemExit) as error:
            give_up(f"{type(error).__name__}: {error}")
            self.extensions = self.distribution.ext_modules = []


class Wheel(bdist_wheel):
    """A wheel whose tag says what is in it, also where the extension's build was given up."""

    def get_tag(self) -> tuple[str, str, str]:
        """Of a pure Python wheel, unless the extension was built."""
        if self.distribution.ext_modules:
            return super().get_tag()
        self.root_is_pure = True
        return "py3", "none", "any"


def extension() -> tuple[list, type]:
    """The extension and the command that builds it; no extension without torch."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        give_up(f"{error} (install torch first, then asymkv with --no-build-isolation)")
        return [], build_ext
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    options: dict = {"py_limited_api": True, "extra_compile_args": {"cxx": CXX_FLAGS}}
    kind = CppExtension
    if torch.version.cuda and CUDA_HOME:
        kind = CUDAExtension
        sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu"))
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        last = CUDA_ARCHS[-1]
        codes.append(f"-gencode=arch=compute_{last},code=compute_{last}")
        options["extra_compile_args"]["nvcc"] = [*NVCC_FLAGS, *codes]

    class TorchBuild(OptionalBuild, BuildExtension):
        """torch's command, made optional."""

    return [kind("asymkv._C", sources, **options)], TorchBuild


# `python setup.py --version`, sdist and the like build nothing.
EXTENSIONS, COMMAND = extension() if {"build_ext", "bdist_wheel", "editable_wheel", "install", "develop", "build"} & {
    *sys.argv
} else ([], build_ext)

setup(
    packages=[*find_packages(include=["asymkv", "asymkv.*"]), *CONFIG_PACKAGES],
    package_dir=CONFIG_PACKAGES,
    package_data={name: ["*.yaml", "*.json", "*.safetensors"] for name in CONFIG_PACKAGES} | {"asymkv": ["py.typed"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": COMMAND, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
