"""No compiled CUDA kernel spills registers, and the check finds a spill. nvcc's warnings are errors in CI's build."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.bench.checks import cuda_resources as tool
from rlhf_fast.bench.checks import sass

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sass.cuobjdump() is None, reason="no cuobjdump, neither CUDA's nor Triton's")


def measure(*arguments):
    command = [sys.executable, "-m", "rlhf_fast.bench.checks.cuda_resources", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(tool.binary() is None, reason="rlhf_fast._cuda is not built")
@pytest.mark.slow
def test_no_kernel_spills(tmp_path):
    completed = measure("--save", tmp_path / "table.md")
    assert completed.returncode == 0, completed.stderr
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    compiled = {(row[0].removeprefix("| ").partition(".")[0], row[1]) for row in rows[1:]}
    archs = {arch for _, arch in compiled}
    assert archs and all(int(row[2]) > 0 for row in rows[1:])
    assert max(int(row[3]) for row in rows[1:]) <= 16 << 10, (
        "csrc/cuda/launch.cuh assumes at most 16 KiB of static memory"
    )
    stems_with_kernels = [p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu") if "__global__" in p.read_text()]
    missing = {(stem, arch) for stem in stems_with_kernels for arch in archs} - compiled
    assert not missing, f"not in the binary: {sorted(missing)}; build it again"


KERNELS = """
namespace {
template <int n> __global__ void __launch_bounds__(1024) spilling(const float* x, float* out, int steps) {
  float values[n];
  for (int i = 0; i < n; ++i) values[i] = x[i * 1024 + threadIdx.x];
  for (int s = 0; s < steps; ++s)
    for (int i = 0; i < n; ++i) values[i] = values[(i + 7) % n] * values[i] + x[i];
  for (int i = 0; i < n; ++i) out[i * 1024 + threadIdx.x] = values[i];
}
struct Args { float4* out; };
__global__ void vectorized(Args args, const float4* x) {
  float4* out = args.out;
  __shared__ float4 values[64];
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}
}
const void* spilling_pointer = reinterpret_cast<const void*>(spilling<96>);
const void* vectorized_pointer = reinterpret_cast<const void*>(vectorized);
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.slow
def test_a_spill_is_found_and_a_kernel_without_one_is_not_reported(tmp_path):
    source, binary = tmp_path / "planted.cu", tmp_path / "planted.fatbin"
    source.write_text(KERNELS)
    subprocess.run(["nvcc", "-arch=sm_80", "-fatbin", str(source), "-o", str(binary)], check=True)
    completed = measure("--file", binary)
    assert completed.returncode == 1
    assert re.fullmatch(r"FAULT planted\.spilling<96> for sm_80: \d+ spills\n", completed.stderr), completed.stderr
    (row,) = [line.split() for line in completed.stdout.splitlines() if line.startswith("planted.vectorized ")]
    assert row[1] == "sm_80" and row[3:] == ["1024", "0", "/", "0", "1", "/", "1"]
    assert measure("--file", binary, "planted").stdout == completed.stdout
    completed = measure("--file", binary, "gae")
    assert completed.returncode == 2 and "planted.fatbin has no kernel of gae; it has: planted" in completed.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_the_compiler_fuses_no_product_with_a_sum(name, tmp_path):
    """It would in the kernel for aligned rows and not in the other, and a row's bits would depend on its address."""
    found = []
    for fuses in ("true", "false"):
        binary = tmp_path / f"{fuses}.cubin"
        flags = ["-O3", "-std=c++17", "-arch=sm_90", "-cubin", "-diag-suppress", "177", f"-fmad={fuses}"]
        source = ROOT / "csrc" / "cuda" / f"{name}.cu"
        includes = [f"-I{ROOT / 'csrc'}", '-DKERNEL_GROUP="cuda"']
        subprocess.run(["nvcc", *flags, *includes, str(source), "-o", str(binary)], check=True)
        code = subprocess.run([str(sass.cuobjdump()), "-sass", str(binary)], check=True, capture_output=True, text=True)
        found.append(re.findall(r"/\*[0-9a-f]{4,5}\*/\s+([^;`]+)", code.stdout))
    assert sum(instruction.startswith("FFMA") for instruction in found[0]) > 100 and found[0] == found[1]


def test_a_missing_file_is_an_error_of_one_sentence(tmp_path):
    completed = measure("--file", tmp_path / "nothing.so")
    assert (
        completed.returncode == 2
        and "rlhf_fast._cuda is not built: install with nvcc, or name a file" in completed.stderr
    )
