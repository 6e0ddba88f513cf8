// How a CUDA kernel is launched, and the memory that its block shares: for nvcc, and for g++ in the tests, where
// tests/simt stands in for the runtime and runs the same source on the CPU.
#pragma once
#include <cuda_runtime.h>

#include "kernel.h"

namespace {

// Bytes of shared memory that a block may have on the current device.
__host__ inline size_t shared_memory_limit() {
#if defined(__CUDACC__)
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
#else
  return 227 << 10;
#endif
}

// nullptr, or what is wrong with the launch: it becomes a Python exception. Nothing waits for the kernel to end.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, uintptr_t stream,
                   Arguments... arguments) {
#if defined(__CUDACC__)
  // Beyond 48 KiB, static memory included (16 KiB at most: tests/test_cuda_resources.py), a kernel must be allowed to.
  // What is allowed is the kernel's, not the launch's: always all there is, so that threads do not undo one another's.
  if (shared_bytes > (32u << 10)) {
    cudaFuncAttributes own;
    cudaError_t error = cudaFuncGetAttributes(&own, kernel);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_memory_limit() - own.sharedSizeBytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would tell of it
      return cudaGetErrorString(error);
    }
  }
  kernel<<<grid, block, shared_bytes, ptr<CUstream_st>(stream)>>>(Parameters(arguments)...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  (void)stream;
  return simt::run(grid, block, shared_bytes, [=] { kernel(Parameters(arguments)...); });
#endif
}

// The block's dynamic shared memory, whose size the launch gives.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char block_memory[];
  return reinterpret_cast<T*>(block_memory);
#else
  return reinterpret_cast<T*>(simt::state.shared.data());
#endif
}

// Blocks for `work` items, `each` a block; 0 where they are more than a grid has.
__host__ inline unsigned blocks_for(int64_t work, int64_t each) {
  const int64_t blocks = (work + each - 1) / each;
  return blocks <= 0x7fffffff ? static_cast<unsigned>(blocks) : 0;
}

}  // namespace
