"""Compile csrc/ without torch: csrc/cpu to rlhf_fast._cpu and, if nvcc is found, csrc/cuda to rlhf_fast._cuda.

RLHF_FAST_CUDA=auto|0|1        1: fail when nvcc is missing; 0: leave CUDA out            (default auto)
RLHF_FAST_CUDA_ARCHS="80;90+PTX"  compute capabilities; +PTX adds code that later GPUs can translate
RLHF_FAST_EXT=0                compile nothing: every op runs as plain torch
RLHF_FAST_REQUIRE_EXT=1        a missing compiler is an error, not a warning
CXX, MAX_JOBS                  the C++ compiler; the number of compilations at once

A compiler that is there and does not compile is an error, always. No older extension is left in place of one that was
not built.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OPTIONAL = os.environ.get("RLHF_FAST_REQUIRE_EXT") != "1"
ISA_FLAGS = {"generic": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = "-mavx2 -mfma"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"


def report(sentence: str) -> None:
    print(f"[rlhf-fast] {sentence}", flush=True)


def find_nvcc() -> str | None:
    mode = os.environ.get("RLHF_FAST_CUDA", "auto")
    if mode == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes] + [Path("/usr/local/cuda/bin/nvcc")]
    if on_path := shutil.which("nvcc"):
        candidates.insert(len(homes), Path(on_path))
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    if mode == "1":
        raise SystemExit("[rlhf-fast] RLHF_FAST_CUDA=1 but nvcc was not found; set CUDA_HOME to the toolkit's folder")
    return None


def toolkit_libraries(nvcc: str) -> Path:
    """Return the folder of libcudart_static.a, below the root that nvcc reports: it may be a wrapper script."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    tops = [line.split("=", 1)[1].strip() for line in dryrun.splitlines() if line.startswith("#$ TOP=")]
    top = Path(tops[0]).resolve() if tops else Path(nvcc).resolve().parent.parent
    for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        if (top / folder / "libcudart_static.a").is_file():
            return top / folder
    raise SystemExit(
        f"[rlhf-fast] libcudart_static.a was not found below {top}; set RLHF_FAST_CUDA=0 to build without CUDA"
    )


def gencode(archs: str) -> str:
    flags = []
    for arch in archs.split(";"):
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


OPENMP_PROBE = """#include <omp.h>
int main() {
  int n = 0;
#pragma omp parallel reduction(+ : n)
  n += omp_get_num_threads();
  return n < 1;
}
"""


def openmp_flags(cxx: list[str], folder: Path) -> tuple[str, str]:
    """Return the flags of compiler and linker for OpenMP, empty where the compiler has none.

    On Linux g++ code is linked without libgomp: kernels/_openmp.py gives it the one that torch brings. A second one in
    the process would have its own threads beside torch's.
    """
    probe, program = folder / "openmp.cpp", folder / "openmp"
    probe.write_text(OPENMP_PROBE)
    if subprocess.run([*cxx, "-fopenmp", str(probe), "-o", str(program)], capture_output=True).returncode:
        return "", ""
    for_torchs = platform.system() == "Linux" and b"GOMP_parallel" in program.read_bytes()
    return "-fopenmp", "" if for_torchs else "-fopenmp"


RULES = """
rule cxx
  command = $cxx -MMD -MF $out.d $cxxflags $extra -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cu
  command = $nvcc -MD -MF $out.d $nvflags $extra -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in -o $out $ldflags
"""


def find_cxx() -> list[str] | None:
    """Return the words of the C++ compiler's command, or None where there is none."""
    named = os.environ.get("CXX", "")
    try:
        words = shlex.split(named)
    except ValueError as error:
        raise SystemExit(f"[rlhf-fast] CXX={named} is no command: {error}") from error
    if words:
        return words if shutil.which(words[0]) else None
    if named:
        raise SystemExit("[rlhf-fast] CXX is blank; set it to a C++ compiler's command, or unset it")
    found = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    return [found] if found else None


def ninja_file(name: str, folder: Path, target: Path) -> str:
    """Return build.ninja for one extension: each source of csrc/cpu once per instruction set, or csrc/cuda."""
    import pybind11

    cxx = find_cxx()
    assert cxx is not None
    openmp, ldflags = openmp_flags(cxx, folder)
    if not openmp and name.endswith("_cpu"):
        report(f"{shlex.join(cxx)} does not compile with -fopenmp: the CPU kernels will run on ONE thread. To use all")
        report("cores set CXX to a g++ or a clang++ that has OpenMP, and install rlhf-fast again.")
    warnings = "-Wall -Wextra -Wno-psabi -Wno-unused-function -Wno-unknown-pragmas"
    warnings += "" if openmp else " -Wno-unused-parameter"  # num_threads, without OpenMP
    includes = " ".join(
        f'-I"{dollars(path)}"' for path in (pybind11.get_include(), sysconfig.get_paths()["include"], CSRC)
    )
    ldflags += " -undefined dynamic_lookup" if platform.system() == "Darwin" else " -Wl,--exclude-libs,ALL"
    lines = [
        f"cxx = {shlex.join(cxx).replace('$', '$$')}",
        f"cxxflags = -O3 -std=c++17 -fPIC -fvisibility=hidden {warnings} {openmp} {includes}",
    ]
    if name.endswith("_cuda"):
        nvcc, archs = find_nvcc(), gencode(os.environ.get("RLHF_FAST_CUDA_ARCHS", "80;90+PTX"))
        host = "-Xcompiler -fPIC,-fvisibility=hidden -diag-suppress 177"  # unused entries of the kernel table
        lines += [
            f"nvcc = {nvcc}",
            f'nvflags = -O3 -std=c++17 {host} -cudart static --threads 0 {archs} -I"{dollars(CSRC)}"',
        ]
        ldflags += f' -L"{dollars(toolkit_libraries(nvcc))}" -lcudart_static -ldl -lrt -lpthread'
        jobs = [("cu", source, "cuda", "") for source in sorted((CSRC / "cuda").glob("*.cu"))]
    else:
        sources = sorted((CSRC / "cpu").glob("*.cpp"))
        jobs = [("cxx", source, isa, flags) for isa, flags in ISA_FLAGS.items() for source in sources]
    jobs.append(("cxx", CSRC / "module.cpp", "module", f"-DEXTENSION={name.rpartition('.')[2]}"))
    lines += [f"ldflags = {ldflags}", RULES]
    objects = []
    for rule, source, group, extra in jobs:
        objects.append(escaped(folder / f"{source.stem}.{group}.o"))
        lines += [f"build {objects[-1]}: {rule} {escaped(source)}", f'  extra = {extra} -DKERNEL_GROUP=\\"{group}\\"']
    lines += [f"build {escaped(target)}: link {' '.join(objects)}", f"default {escaped(target)}", ""]
    return "\n".join(lines)


def dollars(path: Path | str) -> str:
    """Return a path for use in the double quotes of a command: ninja reads $$ as $, the shell \\$ as $."""
    return str(path).replace("$", "\\$$")


def escaped(path: Path) -> str:
    """Return a path as a file name in ninja's own lines. ninja quotes it for the shell."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Write build.ninja and run it: one rule for C++, one for CUDA, one to link."""

    def run(self) -> None:
        self.is_inplace = bool(self.inplace)  # setuptools builds elsewhere first, and then copies
        self.force = True  # copies even over a newer file, which an earlier build of other sources may have left
        wanted = {ext.name for ext in self.extensions or ()}
        self.remove_all({"rlhf_fast._cpu", "rlhf_fast._cuda"} - wanted)
        try:
            find_cxx()  # before setuptools reads CXX, which has no sentence for a bad one
        except SystemExit:
            self.remove_all(wanted)
            raise
        super().run()

    def remove_all(self, names: set[str]) -> None:
        for name in names:
            self.remove_older(Path(self.build_lib).resolve() / self.get_ext_filename(name))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if find_cxx() is None:
            self.remove_older(target)
            missing = f"CXX={os.environ['CXX']} was not found" if os.environ.get("CXX") else "there is no C++ compiler"
            if not OPTIONAL:
                raise SystemExit(f"[rlhf-fast] {ext.name} cannot be built: {missing}")
            report("=" * 80)
            report(f"{ext.name} COULD NOT BE BUILT: {missing}")
            report("rlhf-fast will run on its plain-torch references, many times slower. `rlhf-fast env` shows it.")
            report("To fix it, install a C++17 compiler (g++ or clang++) and install rlhf-fast again.")
            report("=" * 80)
            return
        try:
            self.run_ninja(ext.name, target)
        except SystemExit:
            self.remove_older(target)
            raise
        except (OSError, subprocess.CalledProcessError) as error:
            self.remove_older(target)
            without = "RLHF_FAST_CUDA=0" if ext.name.endswith("_cuda") else "RLHF_FAST_EXT=0"
            raise SystemExit(
                f"[rlhf-fast] {ext.name} was not built: its compiler is there and failed, as shown above ({error})."
                f" Mend what it names, or set {without} to install without {ext.name}."
            ) from error

    def remove_older(self, target: Path) -> None:
        """Remove what an earlier build left, which would run in place of the sources that are there now."""
        target.unlink(missing_ok=True)
        if self.is_inplace:
            (ROOT / "rlhf_fast" / target.name).unlink(missing_ok=True)

    def run_ninja(self, name: str, target: Path) -> None:
        import ninja

        folder = Path(self.build_temp).resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(name, folder, target))
        parallel = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        program = shutil.which("ninja") or str(Path(ninja.BIN_DIR) / "ninja")
        subprocess.check_call([program, *parallel, "-C", str(folder)])

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file()]


extensions = [Extension("rlhf_fast._cpu", sources=[], optional=OPTIONAL)]
if os.environ.get("RLHF_FAST_EXT") == "0":
    extensions = []
    report("RLHF_FAST_EXT=0: nothing is compiled; every op runs as plain torch")
elif nvcc := find_nvcc():
    report(f"CUDA kernels: yes, by {nvcc}")
    extensions.append(Extension("rlhf_fast._cuda", sources=[], optional=OPTIONAL))
else:
    report("CUDA kernels: no (nvcc not found, or RLHF_FAST_CUDA=0)")
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
