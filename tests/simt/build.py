"""Compile csrc/cuda with g++ and simt.h: the same kernels, run on the CPU, as the extension module `_simt`.

python tests/simt/build.py FOLDER [--sanitize]    prints the module's path
"""

import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unknown-pragmas"]
FLAGS = [
    *["-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DSIMT"],
    "-U_FORTIFY_SOURCE",  # some systems' default, whose longjmp refuses to leave a stack for another
    *WARNINGS,
]
SANITIZERS = [
    *["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "-g1",  # files and lines
]


def compiler() -> str | None:
    return shutil.which("g++")


def includes() -> list[str]:
    import pybind11

    folders = (HERE, CSRC, CSRC / "cuda", pybind11.get_include(), sysconfig.get_paths()["include"])
    return [f"-I{folder}" for folder in folders]


def modified(path: Path) -> float:
    """Return the time of a file's last change, or 0 if it does not exist."""
    return path.stat().st_mtime if path.exists() else 0.0


def kernels() -> list[str]:
    """Return the names of the files of csrc/cuda with kernels."""
    names = [path.stem for path in (CSRC / "cuda").glob("*.cu")]
    return sorted(name for name in names if name != "driver")  # which calls the CUDA runtime


def build(folder: Path, sanitize: bool = False, only: list[str] | None = None) -> Path:
    """Return the module, of the kernels `only` or of all. Compile what is older than its source or than any header."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix, flags = (".san", FLAGS + SANITIZERS) if sanitize else ("", FLAGS)
    headers = [*HERE.glob("*.h"), *CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.cuh"), Path(__file__)]
    newest_header = max(map(modified, headers))
    sources = [CSRC / "cuda" / f"{name}.cu" for name in (only or kernels())]
    jobs = [(source, ["-x", "c++", '-DKERNEL_GROUP="simt"']) for source in sources]
    jobs.append((CSRC / "module.cpp", ["-DEXTENSION=_simt"]))
    module = folder / f"_simt{suffix}.so"
    if not module.exists():
        print("compiling csrc/cuda for the CPU (tests/simt): a minute, once", file=sys.stderr, flush=True)

    def compile_object(job: tuple[Path, list[str]]) -> Path:
        source, extra = job
        target = folder / f"{source.stem}{suffix}.o"
        if modified(target) < max(newest_header, modified(source)):
            run([compiler() or "g++", *flags, *extra, *includes(), "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_object, jobs))
    if modified(module) < max(map(modified, objects)):
        linked = module.with_suffix(".new")
        run([compiler() or "g++", "-shared", *flags, *map(str, objects), "-o", str(linked)])
        linked.replace(module)
    return module


def run(command: list[str]) -> None:
    """Run a command; RuntimeError with its messages if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), "--sanitize" in sys.argv))
