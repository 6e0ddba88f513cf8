"""No CUDA kernel spills, as the compiled binary shows it, and a spill would be seen; nvcc has nothing to warn of."""

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
def test_no_kernel_spills(tmp_path):
    said = measure("--save", tmp_path / "table.md")
    assert said.returncode == 0, said.stderr
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    compiled = {(row[0].removeprefix("| ").partition(".")[0], row[1]) for row in rows[1:]}
    archs = {arch for _, arch in compiled}
    assert archs and all(int(row[2]) > 0 for row in rows[1:])
    assert max(int(row[3]) for row in rows[1:]) <= 16 << 10, "csrc/cuda/launch.cuh counts on 16 KiB of static memory"
    launching = [p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu") if "__global__" in p.read_text()]
    missing = {(stem, arch) for stem in launching for arch in archs} - compiled
    assert not missing, f"not in the binary: {sorted(missing)}; build it again"


KERNELS = """
namespace {
template <int n> __global__ void __launch_bounds__(1024) greedy(const float* x, float* out, int steps) {
  float held[n];
  for (int i = 0; i < n; ++i) held[i] = x[i * 1024 + threadIdx.x];
  for (int s = 0; s < steps; ++s)
    for (int i = 0; i < n; ++i) held[i] = held[(i + 7) % n] * held[i] + x[i];
  for (int i = 0; i < n; ++i) out[i * 1024 + threadIdx.x] = held[i];
}
struct Numbers { float4* out; };
__global__ void wide(Numbers numbers, const float4* x) {
  float4* out = numbers.out;
  __shared__ float4 held[64];
  held[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[63 - threadIdx.x];
}
}
const void* greedy_of = reinterpret_cast<const void*>(greedy<96>);
const void* wide_of = reinterpret_cast<const void*>(wide);
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_spill_is_seen_and_a_clean_kernel_is_not_taken_for_one(tmp_path):
    source, made = tmp_path / "planted.cu", tmp_path / "planted.fatbin"
    source.write_text(KERNELS)
    subprocess.run(["nvcc", "-arch=sm_80", "-fatbin", str(source), "-o", str(made)], check=True)
    said = measure("--file", made)
    assert said.returncode == 1
    assert re.fullmatch(r"FAULT planted\.greedy<96> for sm_80: \d+ spills\n", said.stderr), said.stderr
    (wide,) = [line.split() for line in said.stdout.splitlines() if line.startswith("planted.wide ")]
    assert wide[1] == "sm_80" and wide[3:] == ["1024", "0", "/", "0", "1", "/", "1"]
    assert measure("--file", made, "planted").stdout == said.stdout
    said = measure("--file", made, "gae")
    assert said.returncode == 2 and "planted.fatbin has no kernel of gae; it has: planted" in said.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_nvcc_warns_of_nothing(source, tmp_path):
    """Its front end alone, which takes seconds; setup.py suppresses the same."""
    flags = "-std=c++17 -arch=sm_80 -cuda -diag-suppress 177 -Werror all-warnings".split()
    command = ["nvcc", *flags, f"-I{ROOT / 'csrc'}", '-DKERNEL_GROUP="cuda"', str(source), "-o", str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0 and not said.stderr, said.stderr


def test_a_file_that_is_not_there_or_has_no_kernel_is_one_sentence(tmp_path):
    said = measure("--file", tmp_path / "nothing.so")
    assert said.returncode == 2 and "rlhf_fast._cuda is not built: install with nvcc, or name a file" in said.stderr
