// Launches a CUDA kernel and finds its shared memory. nvcc compiles this for a GPU; in the tests g++ does, with
// tests/simt in place of the CUDA runtime, and the same kernels run on the CPU.
#pragma once
#include <cuda_runtime.h>

#include "kernel.h"

namespace {

// Bytes of shared memory that the driver keeps for itself from sm_90 on. A kernel that asks for all there is leaves
// them free too: the attribute below might count them.
constexpr size_t driver_shared_bytes = 1024;

// Bytes of shared memory that a block may have on the current device, static and dynamic.
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

// Returns nullptr, or an error message that becomes a Python exception. It does not wait for the kernel to end.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, uintptr_t stream,
                   Arguments... arguments) {
#if defined(__CUDACC__)
  // A kernel must opt in to more than 48 KiB of shared memory, its static part included, which is at most 16 KiB
  // (tests/test_cuda_resources.py). The limit belongs to the kernel, not to the launch: we always set the device's
  // maximum, so that a thread of the host never lowers the limit that another one has just set.
  if (shared_bytes > (32u << 10)) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_memory_limit() - attributes.sharedSizeBytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears the error: the next launch would report it again
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

// The block's dynamic shared memory; the launch sets its size.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char block_memory[];
  return reinterpret_cast<T*>(block_memory);
#else
  return reinterpret_cast<T*>(simt::state.shared.data());
#endif
}

// Blocks for `num_items`, `items_per_block` each; 0 if they exceed what a grid can have.
__host__ inline unsigned blocks_for(int64_t num_items, int64_t items_per_block) {
  const int64_t blocks = (num_items + items_per_block - 1) / items_per_block;
  return blocks <= 0x7fffffff ? static_cast<unsigned>(blocks) : 0;
}

}  // namespace
