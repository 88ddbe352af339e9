"""Every Triton launch compiles for the H200 (sm_90) on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest

# A kernel takes 1-2 s: by default every head dimension, dtype and problem once; all of their combinations are slow.
SOME = ["128-bfloat16-*", "80-float16-few-queries", "80-float16-curvature", "256-float32-decode", "64-float16-decode",
        "96-bfloat16-decode"]  # fmt: skip
PROBLEMS = {"decode", "decode-without-n", "few-queries", "chunk", "mass", "curvature"}


@pytest.mark.parametrize("only", [SOME, pytest.param(["*"], marks=pytest.mark.slow)], ids=["some", "every"])
def test_every_launch_compiles_for_sm_90(only, triton_installed, tmp_path):
    # The interpreter is a setting of the whole process; a fresh cache, so that the compiler does run.
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "asymkv.ops._triton_check", "--only", *only]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    names = [f["problem"].split("-", 2) for f in found]
    assert {dim for dim, _, _ in names} == {"64", "80", "96", "128", "256"}
    assert {dtype for _, dtype, _ in names} == {"float32", "float16", "bfloat16"}
    assert {problem for _, _, problem in names} == PROBLEMS
    for f in found:
        assert f["fits"], f"more shared memory than an SM has: {f}"
        assert f["wide"], f"no loads of 16 bytes: {f}"
        # fp32 must not become TF32; half types must use tensor cores.
        if f["kernel"] != "merge_kernel":
            assert (f["mma"] == "fma") == ("float32" in f["problem"]), f
        if f["kernel"] == "attend_kernel":
            assert f["async"], f"loads are not pipelined: {f}"
