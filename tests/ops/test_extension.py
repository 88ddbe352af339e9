"""Loading the extension, and the column sums as one op for both devices."""

import importlib.machinery
import subprocess
import sys

import pytest
import torch
from rows import columns
from tiny_models import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

import asymkv
from asymkv.ops import extension, reference

SUMS = ("attention_mass", "key_curvature")


def arguments(name, dim=64, dtype=torch.float32):
    args = columns(70, 2, 21, dim, dtype)
    return args if name == "key_curvature" else [*args[:2], *args[3:7], args[8]]


def op(name):
    extension.loaded()
    return getattr(torch.ops.asymkv, name).default


def kernel(name, device):
    extension.loaded()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"asymkv::{name}", device)


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """An extension that is there, but is no library."""
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(asymkv, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "asymkv._C", raising=False)


def test_an_extension_that_cannot_be_loaded_says_why(damaged, monkeypatch):
    monkeypatch.delenv("ASYMKV_REQUIRE_EXT", raising=False)
    with pytest.warns(RuntimeWarning, match="there but cannot be loaded .*_C.abi3.so"):
        assert not extension._load()


def test_an_extension_that_is_required_and_cannot_be_loaded_is_an_error(damaged, monkeypatch):
    monkeypatch.setenv("ASYMKV_REQUIRE_EXT", "1")
    with pytest.raises(ImportError, match=r"_C\.abi3\.so"):
        extension._load()


@pytest.mark.filterwarnings("error")
def test_an_extension_that_is_not_built_is_no_news(tmp_path, monkeypatch):
    monkeypatch.setattr(asymkv, "__path__", [str(tmp_path)])
    # The finder of an editable installation knows where the package is, whatever its path says.
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    monkeypatch.delitem(sys.modules, "asymkv._C", raising=False)
    assert not extension._load()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_device_that_compiled_code_does_not_serve_is_named_once(kind, monkeypatch):
    monkeypatch.setattr(extension, "serves", lambda device: False)
    extension.warn_if_missing.cache_clear()
    with pytest.warns(RuntimeWarning, match={"cpu": r"C\+\+ extension", "cuda": "CUDA extension"}[kind]) as found:
        extension.warn_if_missing(kind)
        extension.warn_if_missing(kind)
    assert len(found) == 1


@pytest.mark.parametrize("name", SUMS)
def test_column_sums_have_a_kernel_for_each_device(name):
    assert kernel(name, "CUDA") and kernel(name, "CPU") == extension.loaded()


def test_without_the_extension_the_column_sums_are_defined_for_cuda():
    code = """if True:
        import sys
        sys.modules["asymkv._C"] = None
        import torch
        from asymkv.ops import extension
        assert not extension.loaded()
        for name in ("attention_mass", "key_curvature"):
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            assert has(f"asymkv::{name}", "CUDA") and not has(f"asymkv::{name}", "CPU")
            print(getattr(torch.ops.asymkv, name).default._schema)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [str(op(name)._schema) for name in SUMS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_cuda_kernels_of_the_column_sums_match_fp64_reference(name, dtype, device):
    args = arguments(name, dtype=dtype)
    on_device = [x.to(device) if torch.is_tensor(x) else x for x in args]
    # Without a GPU, the kernel that is registered for it is called by its key, and runs in Triton's interpreter.
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    have = op(name)(*on_device) if device.type == "cuda" else op(name).redispatch(cuda, *on_device)
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    want = getattr(reference, name)(*wide)
    for x, y in zip([want] if name == "attention_mass" else want, have if isinstance(have, tuple) else [have],
                    strict=True):  # fmt: skip
        assert y.dtype == torch.float32 and y.device.type == device.type
        assert_close(name, x, y.cpu(), 4e-6 if name == "attention_mass" else 2e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_kernels_serve_both_devices(device):
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {name: [torch.empty(x.shape, dtype=x.dtype, device=device) if torch.is_tensor(x) else x
                        for x in arguments(name)] for name in SUMS}  # fmt: skip
        mass, (square, product) = (op(name)(*fakes[name]) for name in SUMS)
    assert mass.shape == (2, 2, 70) and square.shape == (2, 70, 64) and product.shape == (2, 70, 32)
    assert {x.device.type for x in (mass, square, product)} == {device}
