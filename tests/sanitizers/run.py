"""Run tests of the CPU kernels under the compiler's sanitizers.

python tests/sanitizers/run.py address,undefined [pytest's arguments]
python tests/sanitizers/run.py thread [pytest's arguments]

csrc/cpu is compiled into build/sanitizers/, which takes minutes once, and plugin.py has the tests run on that. Python
and torch are as always, but use the sanitizer's allocator, so that tensors have red zones around them. The exit status
is not 0 if a test fails or a sanitizer reports an error.

libgomp is not compiled with ThreadSanitizer, which would not see its barriers: for `thread`, openmp.cpp stands in its
place, and each parallel region runs on 3 threads, however little there is to do. Loads and stores that are intrinsics
are not seen either: those of cpu:generic, which has none, are the same.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# g++ takes a third of the time if AddressSanitizer's checks are calls and UBSan does not check pointers.
FLAGS = (
    "-O2 -g1 -fno-omit-frame-pointer --param asan-instrumentation-with-call-threshold=0"
    " -fno-sanitize=null,alignment,object-size,vptr,pointer-overflow"
)
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
KERNELS = ("ops", "adamw_step", "varlen_attention", "decode_attention", "decode_order", "decode_rows", "linear_layer")
HEADS = ("linear", "linear_half", "linear_sample_tokens", "sample_tokens", "filters", "fused", "prompt_attention")
FILES = [f"tests/test_{name}.py" for name in KERNELS + HEADS]
SELECTED = "not simt and not triton and not compiles and not contract and not peak_memory and not samples_do_not"


def compile_openmp(folder: Path) -> Path:
    """Return openmp.cpp's object file."""
    target = folder / "openmp.o"
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-fsanitize=thread"]
    subprocess.run(["g++", *flags, "-c", str(HERE / "openmp.cpp"), "-o", str(target)], check=True)
    return target


def build(sanitizers: str) -> Path:
    """Return the extension module, compiled with these sanitizers."""
    folder = ROOT / "build" / "sanitizers" / sanitizers.replace(",", "-")
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"-fsanitize={sanitizers} {FLAGS}"
    if sanitizers == "thread":
        flags += f" -Wl,{shlex.quote(str(compile_openmp(folder)))}"
    compiler = ["sh", "-c", f'exec g++ "$@" {flags}', "g++"]  # after setup.py's own flags, among which is -O3
    env = os.environ | {"CXX": shlex.join(compiler), "RLHF_FAST_CUDA": "0", "RLHF_FAST_REQUIRE_EXT": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(folder), "--build-lib", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env=env)
    module = next((folder / "rlhf_fast").glob("_cpu*.so"))
    names = subprocess.run(["nm", "-Du", str(module)], capture_output=True, text=True, check=True).stdout.split()
    missing = [name for name in names if name.startswith(("GOMP_", "omp_"))]
    if sanitizers == "thread" and missing:
        raise SystemExit(f"tests/sanitizers/openmp.cpp lacks what csrc/cpu calls: {', '.join(missing)}; add it there")
    return module


def sanitized(sanitizers: str, program: list[str], **variables: str) -> list[str]:
    """Return a command that runs a program with these environment variables and the sanitizers' allocator."""
    names = [RUNTIMES[name] for name in sanitizers.split(",")]
    paths = [subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    variables |= {
        "LD_PRELOAD": ":".join(path.strip() for path in paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": os.environ.get("UBSAN_OPTIONS", "halt_on_error=1"),
        "OMP_NUM_THREADS": "3",
    }
    fixed_addresses = ["setarch", platform.machine(), "-R"]  # ThreadSanitizer wants memory where it expects it
    return [*fixed_addresses, "env", *[f"{name}={value}" for name, value in variables.items()], *program]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run tests of the CPU kernels under the compiler's sanitizers.")
    parser.add_argument("sanitizers", choices=["address,undefined", "thread"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="pytest's; without them, tests of every kernel")
    options = parser.parse_args()
    variables = {
        "SANITIZED_CPU": str(build(options.sanitizers)),
        "PYTHONPATH": f"{HERE}:{ROOT}",
        "RLHF_FAST_SIMT": "",  # neither compiles csrc/cuda nor interprets Triton's kernels
        "TRITON_INTERPRET": "0",
    }
    pytest = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-n", "0", "--capture=sys"]
    pytest += options.arguments or [*FILES, "-k", SELECTED]
    return subprocess.run(sanitized(options.sanitizers, pytest, **variables), cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
