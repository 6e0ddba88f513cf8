"""tests/simt runs CUDA's source on the CPU: what it must get right, and the faults that it must see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import build  # noqa: E402

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
    """Exit status and output of a program that launches `kernel(float* out)` in blocks of 64 threads."""
    source, program = folder / "program.cu", folder / "program"
    text = PROGRAM % (kernel, grid, shared)
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
        flags = build.FLAGS + build.SANITIZERS * sanitize
        build.run([build.compiler(), *flags, *build.includes(), "-x", "c++", str(source), "-o", str(program)])
    env = os.environ | {"SIMT_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=env)
    return done.returncode, done.stdout + done.stderr


REVERSED = """
__global__ void kernel(float* out) {
  float* memory = shared_memory<float>();
  memory[threadIdx.x] = threadIdx.x;
  %s
  out[threadIdx.x] = memory[63 - threadIdx.x];
}
"""


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
def test_threads_share_memory_over_a_barrier(tmp_path, sanitize):
    for seed in range(1, 4):
        status, said = run(tmp_path, REVERSED % "__syncthreads();", shared="256", sanitize=sanitize, seed=seed)
        assert (status, said.split()) == (0, [str(63 - i) for i in range(64)])


def test_a_missing_barrier_shows(tmp_path):
    """Threads run until they wait: half of them read what no one has written, and shared memory starts as NaN."""
    for seed in range(1, 6):
        status, said = run(tmp_path, REVERSED % "", shared="256", seed=seed)
        assert status == 0 and said.count("nan") == 32


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
    status, said = run(tmp_path, kernel, grid="2")
    assert status == 0 and said.count("nan") == 32 and said.split()[32:] == ["5"] * 32


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
    status, said = run(tmp_path, DIVERGENT % "__syncthreads();")
    assert status == 3 and "program.cu:7" in said and "program.cu:9" in said, said
    assert "__syncthreads in thread (" in said and "for the same barrier" in said


def test_a_barrier_that_some_never_reach_is_an_error(tmp_path):
    """A warp that waits for its lanes while they wait for the block."""
    kernel = """
    __global__ void kernel(float* out) {
      if (threadIdx.x % 2) __syncwarp(); else __syncthreads();
      out[threadIdx.x] = 1.f;
    }"""
    status, said = run(tmp_path, kernel)
    assert status == 3 and "the others never reach it" in said, said


def test_threads_that_have_ended_count_as_arrived(tmp_path):
    for seed in range(1, 5):
        status, said = run(tmp_path, DIVERGENT % "return;", seed=seed)
        assert (status, said.split()) == (0, ["1"] * 40 + ["-1"] * 24)


def test_a_lane_missing_from_its_mask_and_a_mask_of_ended_lanes_are_errors(tmp_path):
    shuffle = "out[threadIdx.x] = __shfl_down_sync(%s, float(threadIdx.x), 1);"
    status, said = run(tmp_path, "__global__ void kernel(float* out) { %s }" % (shuffle % "0xffffu"))
    assert status == 3 and ("not in its own mask" in said or "only whole warps" in said)
    ended = "__global__ void kernel(float* out) { if (threadIdx.x %% 2) return; %s }" % (shuffle % "0xffffffffu")
    for seed in range(1, 4):
        status, said = run(tmp_path, ended, seed=seed)
        assert status == 3 and ("a thread that has ended" in said or "never reach" in said), said


def test_shuffles_and_votes(tmp_path):
    kernel = """
    __global__ void kernel(float* out) {
      const int t = threadIdx.x, lane = t % 32;
      float x = __shfl_down_sync(~0u, float(t), 1);            // own value in the last lane
      x += 100 * __shfl_xor_sync(~0u, float(lane), 1);
      const bool odd = __ballot_sync(~0u, lane % 2) == 0xaaaaaaaau && __any_sync(~0u, lane == 3);
      const bool all = __all_sync(~0u, lane < 32) && !__all_sync(~0u, lane < 31);
      const int most = __reduce_max_sync(~0u, t), count = __syncthreads_count(t < 7);
      const int up = __shfl_up_sync(~0u, lane, 2), group = __shfl_sync(~0u, lane, 1, 8);
      out[t] = odd && all && most == t / 32 * 32 + 31 && count == 7 && up == (lane < 2 ? lane : lane - 2) &&
               group == lane / 8 * 8 + 1 ? x : -5.f;
    }"""
    for seed in range(1, 4):
        status, said = run(tmp_path, kernel, seed=seed)
        expected = [(t + 1 if t % 32 < 31 else t) + 100 * (t % 32 ^ 1) for t in range(64)]
        assert (status, list(map(float, said.split()))) == (0, expected)


def test_loads_and_stores_past_caches(tmp_path):
    kernel = """
    __global__ void kernel(float* out) {
      float4* four = reinterpret_cast<float4*>(out) + threadIdx.x;
      if (threadIdx.x >= 16) return;
      const float4 before = threadIdx.x % 2 ? __ldcg(four) : __ldcs(four);
      const float4 v = make_float4(threadIdx.x, before.y, before.z - 1.f, before.w);
      threadIdx.x % 2 ? __stcg(four, v) : __stcs(four, v);
    }"""
    status, said = run(tmp_path, kernel)
    assert (status, list(map(float, said.split()))) == (0, [x for t in range(16) for x in (t, -1, -2, -1)])


def test_pairs_of_short_floats_and_shifts_over_two_words(tmp_path):
    """The first of a pair is the low half, as memory has it; both are rounded to the nearest, ties to even."""
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
    status, said = run(tmp_path, kernel)
    assert (status, said.split()) == (0, ["1"] * 64)


@pytest.mark.parametrize("where", ["out[threadIdx.x + 1]", "shared_memory<float>()[threadIdx.x + 1]"])
def test_a_write_out_of_bounds_is_caught_by_the_sanitizer(tmp_path, where):
    kernel = f"__global__ void kernel(float* out) {{ {where} = 1.f; out[threadIdx.x] = 1.f; }}"
    status, said = run(tmp_path, kernel, shared="256", sanitize=True)
    assert status not in (0, 3) and "heap-buffer-overflow" in said and "program.cu" in said, said


def test_undefined_behaviour_is_caught_by_the_sanitizer(tmp_path):
    kernel = "__global__ void kernel(float* out) { int big = 2147483647; out[threadIdx.x] = big + int(threadIdx.x); }"
    status, said = run(tmp_path, kernel, sanitize=True)
    assert status not in (0, 3) and "signed integer overflow" in said


def test_launches_that_a_gpu_refuses_are_errors(tmp_path):
    kernel = "__global__ void kernel(float* out) { out[threadIdx.x] = 1.f; }"
    for options in ({"shared": "228 << 10"}, {"grid": "dim3(1, 65536)"}, {"grid": "0"}):
        status, said = run(tmp_path, kernel, **options)
        assert status == 3 and said.startswith("simt: "), said


@pytest.mark.slow
def test_every_kernel_is_clean_under_the_sanitizers():
    """tests/test_ops.py over the same sources with AddressSanitizer and UBSan, what other tests split over blocks, and
    rows that begin anywhere: tensors of torch lie between red zones then, its allocator being the sanitizer's too."""
    root = build.CSRC.parent
    libraries = [
        subprocess.run([build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = os.environ | {
        "RLHF_FAST_SIMT": str(build.build(root / "build" / "simt", sanitize=True)),
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
    }
    files = [
        f"tests/test_{name}.py" for name in ("ops", "gae", "ppo_advantages", "ppo_loss", "cuda_rows", "cuda_decode")
    ]
    chosen = "simt and as_near_the_truth or split or test_cuda and not (four_numbers or company)"
    tests = [*files, "-k", chosen, "-p", "no:cacheprovider", "-rN"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests], capture_output=True, text=True, env=env, cwd=root, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
