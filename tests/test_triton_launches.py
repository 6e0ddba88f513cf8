"""Triton launches its kernels through its own driver class, on a stub of CUDA's driver, without a GPU."""

import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton launches on Linux only"),
    pytest.mark.skipif(
        not ("CC" in os.environ or shutil.which("gcc") or shutil.which("clang")), reason="no C compiler for Triton"
    ),
]


def run_without_interpreter(*command):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env)


def run_tool(*arguments):
    return run_without_interpreter("-m", "rlhf_fast.bench.checks.triton_launches", *arguments)


@pytest.mark.slow
def test_some_kernels_are_launched():
    """A norm, a scan, a head and a sampler: arguments in tuples, absent ones, and functions that return tuples."""
    names = ("rms_norm", "gae", "linear_logprobs", "sample_tokens")
    result = run_tool(*names, "--sizes", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in names:
        assert all(f"{name} {dtype}: " in result.stdout for dtype in ("float32", "bfloat16")), result.stdout
    assert ", 0 faults" in result.stdout.splitlines()[-1] and ": 0 launches" not in result.stdout


@pytest.mark.slow
def test_every_kernel_is_launched():
    result = run_tool()
    assert result.returncode == 0, result.stderr[-2000:]


BROKEN = """
import sys
from rlhf_fast.bench.checks import triton_launches as tool
from rlhf_fast.kernels.triton import launch, swiglu as module
import torch, triton, triton.language as tl

@triton.jit
def named_options_kernel(options, x):
    tl.store(x, options)

@triton.jit
def undefined_kernel(x):
    tl.store(x, no_such_value)

@triton.jit
def twice_kernel(x):
    tl.store(x, 2.0)

def named_options(gate, up):
    launch.run(named_options_kernel, (1,), 1.0, gate)

def undefined(gate, up):
    launch.run(undefined_kernel, (1,), gate)

def long_grid(gate, up):
    launch.run(twice_kernel, (1, 65536), gate)

def host_list(gate, up):
    launch.run(twice_kernel, (1,), [gate.shape])

def right(gate, up):
    launch.run(twice_kernel, (1, 65535), gate)

sys.argv = ["triton_launches", "swiglu", "--sizes", "1"]
for call in (named_options, undefined, long_grid, host_list, right):
    module.swiglu = call
    print(call.__name__, "exits with", tool.main(), flush=True)
"""


@pytest.mark.slow
def test_a_launch_that_fails_is_a_fault(tmp_path):
    """`options` is a name in the function that Triton generates to bind arguments."""
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    result = run_without_interpreter(file)
    exits = [line for line in result.stdout.splitlines() if "exits with" in line]
    broken = ["named_options", "undefined", "long_grid", "host_list"]
    assert exits == [*(f"{name} exits with 1" for name in broken), "right exits with 0"], result.stdout + result.stderr
    assert "SyntaxError: duplicate argument 'options'" in result.stderr and "no_such_value" in result.stderr
    assert "too large for an H100" in result.stderr


@pytest.mark.slow
def test_a_missing_compiler_and_an_unknown_op_are_one_sentence(monkeypatch):
    result = run_tool("no_such_op")
    assert result.returncode == 2 and "there is no op no_such_op; there are:" in result.stderr
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    result = run_tool("swiglu")
    assert result.returncode == 2 and "no C compiler, which Triton needs as well" in result.stderr
    assert "Traceback" not in result.stderr
