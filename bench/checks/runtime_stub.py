"""Build csrc/cuda by nvcc on a stub of CUDA's runtime, which records the launches of our own launchers without a GPU.

The extension holds the same machine code as an installed one for an H100. Its launchers run on the CPU and choose
kernels, grids and shared memory as on a GPU; the stub notes each launch and runs none.
"""

import ctypes
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCH = 90
GROUP = "simt"  # of the entries: kernels/ gives such a module the launchers for CUDA, on tensors of any device
SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { unsigned x, y, z; } dim3;
typedef struct { const void* address; const char* name; } Function;
typedef struct { const char* name; dim3 grid, block; size_t shared; } Launch;

enum { SHARED_MEMORY = 227 << 10, NUM_SMS = 132, SMS = 16, OPTIN = 97, MAX = 4096 };
static Function functions[MAX];
static Launch launches[MAX], pending;
static int num_functions, num_launches;

int stub_num_launches(void) { return num_launches; }
void stub_clear(void) { num_launches = 0; }
const char* stub_name(int i) { return launches[i].name; }
void stub_sizes(int i, int64_t* out) {
  const Launch* l = &launches[i];
  const int64_t sizes[7] = {l->grid.x, l->grid.y, l->grid.z, l->block.x, l->block.y, l->block.z, (int64_t)l->shared};
  memcpy(out, sizes, sizeof sizes);
}

void** __cudaRegisterFatBinary(void* binary) { static void* handle; return (void)binary, &handle; }
void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
void __cudaUnregisterFatBinary(void** handle) { (void)handle; }
void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int external, size_t size,
                       int constant, int global) {}
void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int thread_limit,
                            void* tid, void* bid, void* block, void* grid, int* warp_size) {
  if (num_functions < MAX) functions[num_functions++] = (Function){host, name};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  return pending = (Launch){NULL, grid, block, shared}, 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  return *grid = pending.grid, *block = pending.block, *shared = pending.shared, 0;
}
int cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  for (int i = 0; i < num_functions && num_launches < MAX; ++i)
    if (functions[i].address == host) launches[num_launches++] = (Launch){functions[i].name, grid, block, shared};
  return 0;
}
int __cudaGetKernel(void** kernel, const void* host) { return *kernel = (void*)host, 0; }
int __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
int cudaGetDevice(int* device) { return *device = 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  return *value = attribute == SMS ? NUM_SMS : attribute == OPTIN ? SHARED_MEMORY : 0, 0;
}
int cudaFuncGetAttributes(void* attributes, const void* function) { return memset(attributes, 0, 64), 0; }
int cudaFuncSetAttribute(const void* function, int attribute, int value) { return 0; }
int cudaGetLastError(void) { return 0; }
const char* cudaGetErrorString(int error) { return "an error of the stub"; }
int cudaDriverGetVersion(int* version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int* version) { return *version = 13000, 0; }
"""


class CudaLaunch(NamedTuple):
    """A launch: the kernel's mangled name, blocks, threads of a block and bytes of its dynamic shared memory."""

    function: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int


def nvcc() -> str | None:
    """Return nvcc's path, or None."""
    fixed = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(fixed) if fixed.is_file() else None)


def build(folder: Path) -> Path:
    """Return the extension module `_simt`. Compile what is older than its source or than any header."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    headers = [*CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.cuh"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in headers)
    group = [f'-DKERNEL_GROUP="{GROUP}"', f"-I{CSRC}"]
    gencode = f"arch=compute_{ARCH},code=sm_{ARCH}"
    cuda = [str(nvcc()), "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-diag-suppress", "177"]
    cuda += ["-gencode", gencode, *group]
    host = ["g++", "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", *group]
    paths = (pybind11.get_include(), sysconfig.get_paths()["include"])
    module = [*host, "-DEXTENSION=_simt", *(f"-I{path}" for path in paths)]
    stub = folder / "runtime_stub.c"
    if not stub.exists() or stub.read_text() != SOURCE:
        stub.write_text(SOURCE)
    jobs = [(path, cuda) for path in sorted((CSRC / "cuda").glob("*.cu"))]
    jobs += [(CSRC / "module.cpp", module), (stub, ["gcc", "-O1", "-w", "-fPIC"])]

    def compile_object(job: tuple[Path, list[str]]) -> Path:
        source, command = job
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_object, jobs))
    path = folder / "_simt.so"
    if not path.exists() or path.stat().st_mtime < max(target.stat().st_mtime for target in objects):
        subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(path)], check=True)
    return path


class Recorder:
    """Reads what the launchers of the extension in `path` have launched."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.stub_name.restype = ctypes.c_char_p

    def take(self) -> list[CudaLaunch]:
        """Return the launches since the last call."""
        found = []
        for i in range(self.library.stub_num_launches()):
            sizes = (ctypes.c_int64 * 7)()
            self.library.stub_sizes(i, sizes)
            gx, gy, gz, bx, by, bz, shared = sizes
            found.append(CudaLaunch(self.library.stub_name(i).decode(), (gx, gy, gz), (bx, by, bz), shared))
        self.library.stub_clear()
        return found
