"""Build a stub of CUDA's driver library, on which Triton binds, loads and launches its kernels without a GPU.

Every function that Triton calls is there. None does anything, but a launch that an H100 would refuse is refused: an
empty or too large grid, too many threads or too much shared memory.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import triton

INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"  # Triton brings cuda.h
SOURCE = r"""
#include "cuda.h"

enum { SHARED_MEMORY = 227 << 10 };
static long num_launches;

long stub_launches(void) { return num_launches; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **string) {
  *string = "refused by the stub: empty or too large for an H100";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  default: *value = SHARED_MEMORY;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *size, CUlimit limit) { return *size = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t size) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  return *function = (CUfunction)1, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)out = pointer, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  return *clusters = 1, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (!x || !y || !z || x > 0x7FFFFFFF || y > 0xFFFF || z > 0xFFFF) return CUDA_ERROR_INVALID_VALUE;
  if (!threads || threads > 1024 || config->sharedMemBytes > SHARED_MEMORY) return CUDA_ERROR_INVALID_VALUE;
  ++num_launches;
  return CUDA_SUCCESS;
}
"""


def load(folder: Path) -> ctypes.CDLL:
    """Build the stub in a folder and load it in this process, where Triton's modules then find it by its name."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise FileNotFoundError("no C compiler, which Triton needs as well: install gcc, or name one by CC")
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-w", f"-I{INCLUDE}", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", library]
    subprocess.run([compiler, *options], input=SOURCE, text=True, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
