"""Every Triton kernel compiles for NVIDIA GPUs without one, and takes no more of them than there is."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.kernels._op import OPS

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


def run_without_interpreter(*command, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env)


def run_tool(*arguments, **environment):
    return run_without_interpreter("-m", "rlhf_fast.bench.checks.triton_resources", *arguments, **environment)


def run_code(code, file):
    file.write_text(code)
    return run_without_interpreter(file)


def kernel_names():
    """Return the kernels of kernels/triton/, by the tool's names. By the naming law a kernel's name ends so."""
    names = set()
    for path in (ROOT / "kernels" / "triton").glob("*.py"):
        names |= {f"{path.stem}.{name}" for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}
    assert len(names) > 20
    return names


@pytest.mark.exhaustive(0, slow=2)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("part", range(3))
def test_no_kernel_spills_and_products_use_tensor_cores(part, arch, tmp_path):
    result = run_tool(*sorted(OPS)[part::3], "--arch", arch, "--save", tmp_path / "table.md")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()[2:]]
    assert len(rows) > 10 and {row[3] for row in rows} == {f"sm_{arch}"}
    assert (tmp_path / "table.md").read_text().count("\n| ") == len(rows) + 1


LAUNCHED = """
import rlhf_fast.bench.checks.triton_resources as tool

print(*{(found.name, arch) for found, arch in tool.collect([], tool.SHARED_MEMORY)}, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "kernels" / "triton").is_dir(), reason="not a source checkout")
def test_every_kernel_is_launched_by_an_ops_large_inputs(tmp_path):
    result = run_code(LAUNCHED, tmp_path / "launched.py")
    launched = {ast.literal_eval(line) for line in result.stdout.splitlines()}
    missing = {(name, arch) for name in kernel_names() for arch in (80, 90)} - launched
    assert not missing, f"{sorted(missing)}{result.stderr}"


SPILLS = """
import sys
import rlhf_fast.bench.checks.triton_resources as tool
import triton, triton.language as tl, torch

@triton.jit
def greedy(x, out, D, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(x + at)
    b = tl.load(x + D + at)
    c = tl.load(x + 2 * D + at)
    for i in range(D):
        a, b, c = b + c, a * c, a + b
    tl.store(out + at, a + b + c)

x = torch.empty(64, 8192)
launch = tool.describe_launch(greedy, (x, x, 4096), {"BLOCK": 4096, "num_warps": 1})
print(*[fault for arch in (80, 90) for fault in tool.find_faults(arch, tool.measure(launch, arch))], sep="\\n")
"""


@pytest.mark.slow
def test_a_kernel_that_spills_is_seen(tmp_path):
    result = run_code(SPILLS, tmp_path / "spills.py")
    assert len(re.findall(r"^\d+ spills$", result.stdout, re.M)) == 2, result.stdout + result.stderr


NARROW = """
import rlhf_fast.bench.checks.triton_resources as tool
import triton, triton.language as tl, torch

@triton.jit
def twice(x, out, N, D, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = (at < D - N) if N > 1 else (at < D)
    tl.store(out + row * D + at, 2 * tl.load(x + row * D + at, mask=inside), mask=inside)

x = torch.empty(8, 4096)
for rows, columns in (1, 4096), (3, 4096), (1, 4095):  # a mask that ends at a multiple of 16, or not; odd rows
    launch = tool.describe_launch(twice, (x, x, rows, columns), {"BLOCK": 4096, "num_warps": 8})
    print([fault for arch in (80, 90) for fault in tool.find_faults(arch, tool.measure(launch, arch))])
"""


@pytest.mark.slow
def test_a_mask_that_splits_the_loads_of_aligned_rows_is_seen(tmp_path):
    result = run_code(NARROW, tmp_path / "narrow.py")
    fault = "none of 1 loads of aligned rows has 16 bytes"
    assert result.stdout.splitlines() == ["[]", str([fault, fault]), "[]"], result.stdout + result.stderr


WAITS = """
import rlhf_fast.bench.checks.triton_resources as tool
import torch
from rlhf_fast import ops
from rlhf_fast.kernels.triton import swiglu as module

def item(gate, up):
    return gate * up.sum().item()

def branch(gate, up):
    return gate if up.any() else up

def rows(gate, up):
    return gate[up.sum(-1) > 0]

def numbers(gate, up):
    return gate * up.tolist()[0][0]

for waits in (item, branch, rows, numbers):
    module.swiglu = waits
    try:
        list(tool.op_launches(ops.swiglu, {"shape": (32, 64)}, torch.float32))
    except Exception as error:
        print(waits.__name__, type(error).__name__)
"""


@pytest.mark.slow
def test_a_launcher_that_waits_for_the_device_is_seen(tmp_path):
    result = run_code(WAITS, tmp_path / "waits.py")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["item", "branch", "rows", "numbers"], result
    assert result.stdout.count("DataDependentOutputException") == 3, result


def test_an_unknown_op_and_the_interpreter_are_refused():
    result = run_tool("no_such_op")
    assert result.returncode == 2 and "there is no op no_such_op; there are:" in result.stderr
    result = run_tool("swiglu", TRITON_INTERPRET="1")
    assert result.returncode == 1 and "TRITON_INTERPRET=1 is set" in result.stderr


ON_AMD = """
import torch
from triton.backends.compiler import GPUTarget
import rlhf_fast.bench.checks.triton_resources as tool
from rlhf_fast import ops
from rlhf_fast.kernels._op import OPS
from rlhf_fast.kernels.triton import launch

launch.AMD = True
seen = set()

def check(found, dtype, size):
    key = found.name, dtype, found.options
    if key in seen and found.name != "decode_attention.decode_attention_kernel":
        return
    seen.add(key)
    shared = tool.compile_launch(found, GPUTarget("hip", "gfx942", 64)).metadata.shared
    print("FAULT" * (shared > 64 << 10), found.name, dtype, size, shared)

dtype = torch.%s
for op in filter(tool.has_kernels, OPS.values()):
    for size in op.large_sizes + op.small_sizes[1:2] + op.small_sizes[4:6]:
        for found, _ in tool.op_launches(op, size, dtype, (0,)):
            check(found, dtype, size)
for found in tool.record_launches(lambda: tool.scale_gradients(dtype), 0):
    check(found, dtype, "backward")
"""


@pytest.mark.exhaustive(0, slow=1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_compile_for_an_amd_gpu_and_fit_its_shared_memory(dtype, tmp_path):
    result = run_code(ON_AMD % dtype, tmp_path / "amd.py")
    assert result.returncode == 0 and "FAULT" not in result.stdout, result.stdout[-2000:] + result.stderr[-2000:]
    compiled = {line.split()[0] for line in result.stdout.splitlines()}
    of_halves = {name for name in kernel_names() if name.startswith("_scoring.")}  # they multiply 16 bits
    expected = kernel_names() - (of_halves if dtype == "float32" else set())
    assert of_halves and compiled >= expected, sorted(expected - compiled)
