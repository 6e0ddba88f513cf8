"""tests/simt runs CUDA source on the CPU: it computes the right results and detects faults."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import build

pytestmark = pytest.mark.skipif(build.compiler() is None or not build.CSRC.is_dir(), reason="no g++, or no checkout")

PROGRAM = """
#include <cstdio>
#include "launch.cuh"
%s
int main() {
  float* out = new float[64];
  for (int i = 0; i < 64; ++i) out[i] = -1.f;
  const char* error = launch(kernel, %s, 64, %s, 0, out);
  if (error) return std::puts(error), 3;
  for (int i = 0; i < 64; ++i) std::printf("%%g ", out[i]);
}
"""


def run(folder, kernel, *, grid="1", shared="0", sanitize=False, seed=1):
    """Return exit status and output of a program that launches `kernel(float* out)` in blocks of 64 threads."""
    source, program = folder / "program.cu", folder / "program"
    text = PROGRAM % (kernel, grid, shared)
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
        flags = [*build.FLAGS, '-DKERNEL_GROUP="simt"', *(build.SANITIZERS * sanitize)]
        build.run([build.compiler(), *flags, *build.includes(), "-x", "c++", str(source), "-o", str(program)])
    env = os.environ | {"SIMT_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"}
    completed = subprocess.run([str(program)], capture_output=True, text=True, env=env)
    return completed.returncode, completed.stdout + completed.stderr


REVERSED = """
__global__ void kernel(float* out) {
  float* memory = shared_memory<float>();
  memory[threadIdx.x] = threadIdx.x;
  %s
  out[threadIdx.x] = memory[63 - threadIdx.x];
}
"""


@pytest.mark.parametrize("sanitize", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "sanitized"])
def test_threads_share_memory_over_a_barrier(tmp_path, sanitize):
    for seed in range(1, 4):
        status, output = run(tmp_path, REVERSED % "__syncthreads();", shared="256", sanitize=sanitize, seed=seed)
        assert (status, output.split()) == (0, [str(63 - i) for i in range(64)])


@pytest.mark.slow
def test_a_missing_barrier_shows(tmp_path):
    """Threads run until they wait, so half of them read shared memory before it is written; it starts as NaN."""
    for seed in range(1, 6):
        status, output = run(tmp_path, REVERSED % "", shared="256", seed=seed)
        assert status == 0 and output.count("nan") == 32


@pytest.mark.slow
def test_static_shared_memory_starts_as_nan(tmp_path):
    kernel = """
    template <int n> __global__ void kernel_of(float* out) {
      __shared__ float memory[n];
      if (threadIdx.x >= 32) memory[threadIdx.x] = 5.f;
      __syncthreads();
      out[threadIdx.x] = memory[threadIdx.x];
    }
    constexpr auto kernel = kernel_of<64>;
    """
    status, output = run(tmp_path, kernel, grid="2")
    assert status == 0 and output.count("nan") == 32 and output.split()[32:] == ["5"] * 32


DIVERGENT = """
__global__ void kernel(float* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    %s
  }
  out[threadIdx.x] = 1.f;
}
"""


def test_a_divergent_barrier_is_an_error_that_names_both_places(tmp_path):
    status, output = run(tmp_path, DIVERGENT % "__syncthreads();")
    assert status == 3 and "program.cu:7" in output and "program.cu:9" in output, output
    assert "__syncthreads in thread (" in output and "for the same barrier" in output


@pytest.mark.slow
def test_a_barrier_that_some_never_reach_is_an_error(tmp_path):
    """Half of a warp's lanes wait for the warp while the others wait for the block."""
    kernel = """
    __global__ void kernel(float* out) {
      if (threadIdx.x % 2) __syncwarp(); else __syncthreads();
      out[threadIdx.x] = 1.f;
    }"""
    status, output = run(tmp_path, kernel)
    assert status == 3 and "the others never reach it" in output, output


@pytest.mark.slow
def test_threads_that_have_ended_count_as_arrived(tmp_path):
    for seed in range(1, 5):
        status, output = run(tmp_path, DIVERGENT % "return;", seed=seed)
        assert (status, output.split()) == (0, ["1"] * 40 + ["-1"] * 24)


@pytest.mark.slow
def test_a_lane_missing_from_its_mask_and_a_mask_of_ended_lanes_are_errors(tmp_path):
    shuffle = "out[threadIdx.x] = __shfl_down_sync(%s, float(threadIdx.x), 1);"
    status, output = run(tmp_path, "__global__ void kernel(float* out) { %s }" % (shuffle % "0xffffu"))
    assert status == 3 and ("not in its own mask" in output or "only whole warps" in output)
    ended = "__global__ void kernel(float* out) { if (threadIdx.x %% 2) return; %s }" % (shuffle % "0xffffffffu")
    for seed in range(1, 4):
        status, output = run(tmp_path, ended, seed=seed)
        assert status == 3 and ("a thread that has ended" in output or "never reach" in output), output


def test_shuffles_and_votes(tmp_path):
    kernel = """
    __global__ void kernel(float* out) {
      const int t = threadIdx.x, lane = t % 32;
      float x = __shfl_down_sync(~0u, float(t), 1);            // own value in the last lane
      x += 100 * __shfl_xor_sync(~0u, float(lane), 1);
      const bool odd = __ballot_sync(~0u, lane % 2) == 0xaaaaaaaau && __any_sync(~0u, lane == 3);
      const bool all = __all_sync(~0u, lane < 32) && !__all_sync(~0u, lane < 31);
      const int max_thread = __reduce_max_sync(~0u, t), count = __syncthreads_count(t < 7);
      const int up = __shfl_up_sync(~0u, lane, 2), group = __shfl_sync(~0u, lane, 1, 8);
      out[t] = odd && all && max_thread == t / 32 * 32 + 31 && count == 7 && up == (lane < 2 ? lane : lane - 2) &&
               group == lane / 8 * 8 + 1 ? x : -5.f;
    }"""
    for seed in range(1, 4):
        status, output = run(tmp_path, kernel, seed=seed)
        expected = [(t + 1 if t % 32 < 31 else t) + 100 * (t % 32 ^ 1) for t in range(64)]
        assert (status, list(map(float, output.split()))) == (0, expected)


@pytest.mark.slow
def test_loads_and_stores_past_caches(tmp_path):
    kernel = """
    __global__ void kernel(float* out) {
      float4* four = reinterpret_cast<float4*>(out) + threadIdx.x;
      if (threadIdx.x >= 16) return;
      const float4 before = threadIdx.x % 2 ? __ldcg(four) : __ldcs(four);
      const float4 v = make_float4(threadIdx.x, before.y, before.z - 1.f, before.w);
      threadIdx.x % 2 ? __stcg(four, v) : __stcs(four, v);
    }"""
    status, output = run(tmp_path, kernel)
    assert (status, list(map(float, output.split()))) == (0, [x for t in range(16) for x in (t, -1, -2, -1)])


@pytest.mark.slow
def test_pairs_of_16_bit_floats_and_funnel_shifts(tmp_path):
    """The first number of a pair is the low half; both are rounded to nearest, ties to even."""
    kernel = """
    #include "cuda_bf16.h"
    #include "cuda_fp16.h"
    __global__ void kernel(float* out) {
      const float t = threadIdx.x;
      const __half2 h = __floats2half2_rn(t + 0.25f, 2049.f);
      const __nv_bfloat162 b = __floats2bfloat162_rn(t, 257.f);
      unsigned bits;
      memcpy(&bits, &b, 4);
      const bool same = __half22float2(h).x == t + 0.25f && __half22float2(h).y == 2048.f &&
                        __bfloat162float(b.y) == 256.f && __uint_as_float(bits << 16) == t;
      const bool shifts = __funnelshift_r(0x11112222u, 0x33334444u, 16) == 0x44441111u &&
                          __funnelshift_r(0x11112222u, 0x33334444u, 0) == 0x11112222u;
      out[threadIdx.x] = same && shifts;
    }"""
    status, output = run(tmp_path, kernel)
    assert (status, output.split()) == (0, ["1"] * 64)


@pytest.mark.parametrize("target", ["out[threadIdx.x + 1]", "shared_memory<float>()[threadIdx.x + 1]"])
@pytest.mark.slow
def test_a_write_out_of_bounds_is_caught_by_the_sanitizer(tmp_path, target):
    kernel = f"__global__ void kernel(float* out) {{ {target} = 1.f; out[threadIdx.x] = 1.f; }}"
    status, output = run(tmp_path, kernel, shared="256", sanitize=True)
    assert status not in (0, 3) and "heap-buffer-overflow" in output and "program.cu" in output, output


@pytest.mark.slow
def test_undefined_behaviour_is_caught_by_the_sanitizer(tmp_path):
    kernel = "__global__ void kernel(float* out) { int big = 2147483647; out[threadIdx.x] = big + int(threadIdx.x); }"
    status, output = run(tmp_path, kernel, sanitize=True)
    assert status not in (0, 3) and "signed integer overflow" in output


def test_launches_that_a_gpu_refuses_are_errors(tmp_path):
    kernel = "__global__ void kernel(float* out) { out[threadIdx.x] = 1.f; }"
    for options in ({"shared": "228 << 10"}, {"grid": "dim3(1, 65536)"}, {"grid": "0"}):
        status, output = run(tmp_path, kernel, **options)
        assert status == 3 and output.startswith("simt: "), output


@pytest.mark.slow
def test_the_first_pytest_says_that_it_compiles(tmp_path):
    """In a checkout with one kernel, as a person sees it: without -s."""
    root = build.CSRC.parent
    for folder in ("csrc", "tests/simt", "tests/support"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / "csrc" / "cuda").glob("*.cu"):
        if path.stem != "swiglu":
            path.unlink()
    shutil.copy(root / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_one.py").write_text("import os\ndef test(): assert os.environ['RLHF_FAST_SIMT']\n")
    env = {k: v for k, v in os.environ.items() if k != "RLHF_FAST_SIMT" and not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    shown = [subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True) for _ in range(2)]
    assert all(done.returncode == 0 for done in shown), shown
    said = [done.stdout + done.stderr for done in shown]
    assert "compiling csrc/cuda for the CPU (tests/simt): a minute, once" in said[0] and "compiling" not in said[1]


SANITIZED = [  # the tests of each group, beside those of test_ops.py
    (["decode_attention", "rope_store"], ["cuda_decode"]),
    (["gae", "gae_packed", "ppo_advantages"], ["gae", "ppo_advantages"]),
    (["ppo_loss", "sample_tokens"], ["ppo_loss", "filters"]),
    (["token_logprobs", "ranking_loss", "rms_norm", "layer_norm", "gelu", "swiglu"], ["cuda_rows"]),
]


def test_every_kernel_is_in_a_group_for_the_sanitizers():
    assert sorted(name for kernels, _ in SANITIZED for name in kernels) == build.kernels()


@pytest.mark.exhaustive(0, slow=1)
@pytest.mark.parametrize("kernels, files", SANITIZED, ids=[kernels[0] for kernels, _ in SANITIZED])
def test_kernels_are_clean_under_the_sanitizers(kernels, files):
    """Run tests of the group's ops, of split work and of unaligned rows with AddressSanitizer and UBSan.

    torch then uses the sanitizer's allocator, so its tensors have red zones around them.
    """
    root = build.CSRC.parent
    libraries = [
        subprocess.run([build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = os.environ | {
        "RLHF_FAST_SIMT": str(build.build(root / "build" / "simt" / kernels[0], sanitize=True, only=kernels)),
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
    }
    paths = [f"tests/test_{name}.py" for name in ("ops", *files)]
    selected = "simt and as_near_the_truth or split or number_of_blocks or test_cuda and not coefficients"
    selected += " or test_filters and simt"
    options = ["-k", selected, "-n", "0", "-m", "not slow and not full", "-p", "no:cacheprovider", "-rN", "-vv"]
    command = [sys.executable, "-m", "pytest", *paths, *options]
    completed = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, timeout=900)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    passed = [line for line in completed.stdout.splitlines() if " PASSED" in line]
    of_ops = [line for line in passed if "::test_as_near_the_truth" in line and "-simt-" in line]
    for name in kernels:
        assert any(f"[{name}-" in line for line in of_ops), of_ops
    for file in files:
        assert any(line.startswith(f"tests/test_{file}.py::") for line in passed), passed
