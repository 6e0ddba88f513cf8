"""Compiles csrc/cuda with g++ over simt.h: the same kernels, run on the CPU, as the extension module `_simt`.

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
WARNINGS = "-Wall -Wextra -Wno-unused-function -Wno-unknown-pragmas".split()
FLAGS = [*"-std=c++17 -O1 -g -fPIC -fvisibility=hidden -ffp-contract=off".split(), *WARNINGS]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer".split()


def compiler() -> str | None:
    return shutil.which("g++")


def includes() -> list[str]:
    import pybind11

    folders = (HERE, CSRC, CSRC / "cuda", pybind11.get_include(), sysconfig.get_paths()["include"])
    return [f"-I{folder}" for folder in folders]


def build(folder: Path, sanitize: bool = False) -> Path:
    """The module, compiled anew where a source or header is younger than its object."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix, flags = (".san", FLAGS + SANITIZERS) if sanitize else ("", FLAGS)
    headers = [*HERE.glob("*.h"), *CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.cuh"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in headers)
    jobs = [(source, ["-x", "c++", '-DKERNEL_GROUP="simt"']) for source in sorted((CSRC / "cuda").glob("*.cu"))]
    jobs = [job for job in jobs if job[0].stem != "driver"]  # it asks for a GPU
    jobs.append((CSRC / "module.cpp", ["-DEXTENSION=_simt"]))
    module = folder / f"_simt{suffix}.so"
    if not module.exists():
        print("compiling csrc/cuda for the CPU (tests/simt): a minute, once", file=sys.stderr, flush=True)

    def compiled(job) -> Path:
        source, extra = job
        made = folder / f"{source.stem}{suffix}.o"
        if not made.exists() or made.stat().st_mtime < max(newest, source.stat().st_mtime):
            run([compiler(), *flags, *extra, *includes(), "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, jobs))
    if not module.exists() or module.stat().st_mtime < max(path.stat().st_mtime for path in objects):
        fresh = module.with_suffix(".new")
        run([compiler(), "-shared", *flags, *map(str, objects), "-o", str(fresh)])
        fresh.replace(module)
    return module


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), "--sanitize" in sys.argv))
