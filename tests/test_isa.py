"""One source, several instruction sets: each is picked only where it runs, leaks nothing, and computes alike."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rlhf_fast.kernels._backends import COMPILED
from rlhf_fast.kernels._head import IGNORE_INDEX
from rlhf_fast.kernels._sampling import noise_words
from rlhf_fast.kernels.ppo_loss import STATS

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler (g++ or clang++) on this machine")


def backends_under(isa):
    """The exit status and output of a process that lists gae's backends with RLHF_FAST_ISA set."""
    command = [sys.executable, "-c", "from rlhf_fast import ops; print(*ops.gae.backends)"]
    environment = {**os.environ, "RLHF_FAST_ISA": isa}
    for name in ("RLHF_FAST_BACKEND", "RLHF_FAST_SIMT", "TRITON_INTERPRET"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CSRC.parent)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif("cpu:generic" not in COMPILED, reason="rlhf_fast._cpu is not built")
def test_an_instruction_set_can_be_forced():
    status, output = backends_under("generic")
    assert status == 0, output
    assert output.split()[:2] == ["reference", "cpu:generic"] and "avx" not in output


@pytest.mark.skipif("cpu:generic" not in COMPILED, reason="rlhf_fast._cpu is not built")
def test_an_instruction_set_that_the_processor_lacks_is_refused():
    wanted = "sse9" if "cpu:avx512" in COMPILED else "avx512"
    status, output = backends_under(wanted)
    assert status != 0
    assert f"RLHF_FAST_ISA={wanted} does not run here; this machine has: generic" in output


@pytest.mark.skipif(not FLAGS or not X86, reason="needs Linux on x86, whose /proc/cpuinfo names the instruction sets")
@pytest.mark.skipif("RLHF_FAST_ISA" in os.environ, reason="RLHF_FAST_ISA forces one")
@pytest.mark.skipif("cpu:generic" not in COMPILED, reason="rlhf_fast._cpu is not built")
def test_the_groups_are_those_of_the_processor():
    has = set(next(line for line in FLAGS.splitlines() if line.startswith("flags")).split())
    assert ("cpu:avx2" in COMPILED) == ({"avx2", "fma"} <= has)
    assert ("cpu:avx512" in COMPILED) == ({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"} <= has)


@pytest.mark.parametrize("kernels", COMPILED.values(), ids=list(COMPILED))
def test_constants_agree_with_python(kernels):
    """Python needs these without compiled code too; it reads the others from the module."""
    assert kernels.ignore_index == IGNORE_INDEX
    assert kernels.ppo_loss_num_stats == len(STATS)


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is not installed")
@pytest.mark.slow
def test_objects_export_nothing(tmp_path):
    """The linker merges equal symbols of the instruction sets into one, which might then use what the processor lacks.

    Without optimisation every function that could be inlined is emitted, so this sees all that might ever leak.
    """
    flags = ["-mavx2", "-mfma"] if X86 else []

    def exported(source):
        target = tmp_path / f"{source.stem}.o"
        define = '-DKERNEL_GROUP="avx2"'
        command = [*COMPILER.split(), "-O0", "-std=c++17", "-fPIC", "-w", *flags, f"-I{CSRC}", define, "-c", source]
        subprocess.run([*command, "-o", target], check=True)
        listing = subprocess.run(["nm", "-C", "--defined-only", target], check=True, capture_output=True, text=True)
        rows = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
        # DW.ref.*: a pointer for exception tables, no code.
        return [f"{source.name} exports {n}" for _, kind, n in rows if kind not in "bdrtn" and not n.startswith("DW.")]

    with ThreadPoolExecutor(2) as pool:
        found = pool.map(exported, sorted((CSRC / "cpu").glob("*.cpp")))
        leaks = [leak for of_file in found for leak in of_file]
    assert not leaks, leaks


@needs_compiler
@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump (binutils) is not installed")
@pytest.mark.skipif(platform.system() != "Linux", reason="names the sections of ELF")
def test_objects_run_nothing_when_loaded(tmp_path):
    """A constructor of the AVX2 objects would be an illegal instruction where a machine without AVX loads them."""
    flags = ["-mavx2", "-mfma"] if X86 else []
    target = tmp_path / "ranking_loss.o"
    command = [*COMPILER.split(), "-O0", "-std=c++17", "-fPIC", "-w", *flags, f"-I{CSRC}", '-DKERNEL_GROUP="avx2"']
    subprocess.run([*command, "-c", CSRC / "cpu" / "ranking_loss.cpp", "-o", target], check=True)
    headers = subprocess.run(["objdump", "-h", target], check=True, capture_output=True, text=True).stdout
    sections = [line.split()[1] for line in headers.splitlines() if line.split() and line.split()[0].isdigit()]
    assert "rlhf_fast_kernels" in sections
    assert not [s for s in sections if s.startswith((".init_array", ".ctors", ".text.startup"))], sections


PROBE = """
#include "cpu/philox.h"
#include "cpu/simd.h"
extern "C" {
int width() { return W; }
void probe_exp(const float* x, float* y, long n) { for (long i = 0; i < n; i += W) store(y + i, exp(load(x + i))); }
void probe_log(const float* x, float* y, long n) { for (long i = 0; i < n; i += W) store(y + i, log(load(x + i))); }
void probe_bf16(const float* x, bf16* y, long n) { for (long i = 0; i < n; i += W) store(y + i, load(x + i)); }
void probe_load(const bf16* x, float* y, long n) { for (long i = 0; i < n; i += W) store(y + i, load(x + i)); }
void probe_partial(const float* x, bf16* y, int n) { store_partial(y, load_partial(x, n, -7.f), n); }
float probe_fill(const float* x, int n) { return reduce_sum(load_partial(x, n, 1.f)); }
float probe_max(const float* x) { return reduce_max(load(x)); }
void probe_philox(uint64_t seed, unsigned step, uint64_t row, unsigned quad, unsigned* words, int n) {
  const NoiseKey key = {{(unsigned)seed, (unsigned)(seed >> 32)}, step, {(unsigned)row, (unsigned)(row >> 32)}};
  for (int i = 0; i < n; i += quads_per_call) philox(key, quad + i, words + 4 * i);
}
}
"""


@pytest.fixture(scope="module", params=[4, 8, 16])
def simd(request, tmp_path_factory):
    """simd.h as a library of the given width: 16 is what AVX-512 runs, lowered to what this machine has."""
    if not COMPILER:
        pytest.skip("no C++ compiler (g++ or clang++) on this machine")
    folder = tmp_path_factory.mktemp(f"simd{request.param}")
    (folder / "probe.cpp").write_text(PROBE)
    flags = ["-mavx2", "-mfma"] if request.param > 4 and " avx2 " in FLAGS and " fma " in FLAGS else []
    command = [
        *COMPILER.split(),
        "-O3",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-w",
        *flags,
        f"-DSIMD_WIDTH={request.param}",
    ]
    subprocess.run([*command, f"-I{CSRC}", folder / "probe.cpp", "-o", folder / "probe.so"], check=True)
    library = ctypes.CDLL(str(folder / "probe.so"))
    library.probe_fill.restype = library.probe_max.restype = ctypes.c_float
    assert library.width() == request.param
    return library


def address(x):
    return ctypes.c_void_p(x.data_ptr())


def apply(function, x, dtype=torch.float32):
    y = torch.empty(x.shape, dtype=dtype)
    function(address(x), address(y), ctypes.c_long(x.numel()))
    return y


def ulps(y, truth):
    """Distance from a float64 truth in units of the last place of its float32."""
    spacing = 2.0 ** (truth.abs().log2().floor() - 23)
    return ((y.double() - truth) / spacing).abs().max().item()


def test_exp(simd):
    x = torch.cat([torch.linspace(-87.3, 88.7, 400_000), torch.randn(200_000), 1e-3 * torch.randn(200_000)])
    assert ulps(apply(simd.probe_exp, x), x.double().exp()) <= 1.2
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 89.0, -88.0, -1e30] * 2)
    expected = torch.tensor([1.0, 1.0, float("inf"), 0.0, float("nan"), float("inf"), 0.0, 0.0] * 2)
    torch.testing.assert_close(apply(simd.probe_exp, special), expected, rtol=0, atol=0, equal_nan=True)


def test_log(simd):
    bits = torch.randint(0x00800000, 0x7F800000, (400_000,), dtype=torch.int32)  # every normal float
    x = torch.cat([bits.view(torch.float32), 1 + 1e-3 * torch.randn(200_000), torch.rand(200_000) + 0.5])
    truth = x.double().log()
    assert ulps(apply(simd.probe_log, x)[truth != 0], truth[truth != 0]) <= 1.0
    special = torch.tensor([1.0, 0.0, float("inf"), -1.0, float("nan"), float("-inf"), -0.0, 1.0] * 2)
    torch.testing.assert_close(apply(simd.probe_log, special), special.log(), rtol=0, atol=0, equal_nan=True)


def test_bfloat16(simd):
    bits = torch.randint(-(2**31), 2**31, (400_000,)).int()
    halves = (torch.arange(-(2**15), 2**15).int() << 16) + 0x8000  # exactly between two bfloat16
    x = torch.cat([bits, halves]).view(torch.float32)
    y = apply(simd.probe_bf16, x, torch.bfloat16)
    assert torch.equal(y.isnan(), x.isnan())
    keep = ~x.isnan()
    assert torch.equal(y[keep].view(torch.int16), x[keep].bfloat16().view(torch.int16))
    back = apply(simd.probe_load, y)
    assert torch.equal(back[keep], y[keep].float())


def test_parts_of_a_vector(simd):
    W = simd.width()
    x = torch.randn(W).bfloat16().float()
    assert simd.probe_max(address(x)) == x.max().item()
    for n in range(W + 1):
        y = torch.full((W,), 5.0, dtype=torch.bfloat16)
        simd.probe_partial(address(x), address(y), n)
        assert torch.equal(y[:n].float(), x[:n]) and (y[n:] == 5).all()
        assert abs(simd.probe_fill(address(x), n) - (x[:n].sum().item() + W - n)) < 1e-4


def test_philox(simd):
    quads, quad = 64, 3 * 64
    for seed, step, row in (0, 0, 0), (2**64 - 3, 2**31, 2**63 + 12345), (77, 5, 1 << 40):
        words = torch.empty(4 * quads, dtype=torch.int32)
        simd.probe_philox(
            ctypes.c_ulonglong(seed), ctypes.c_uint(step), ctypes.c_ulonglong(row), quad, address(words), quads
        )
        keys = (torch.tensor([row - 2**64 if row >= 2**63 else row]), torch.tensor([step]))
        expected = noise_words(seed, *keys, 4 * (quad + quads))[0, 4 * quad :]
        assert torch.equal(words.long() & 0xFFFFFFFF, expected)
