// Checks that the machine's NVIDIA driver can run this build. kernels/_backends.py calls it at import, before
// anything touches a device: these two calls create no CUDA context, so the process may still fork.
#include <cuda_runtime.h>
#include <stdio.h>

#include "kernel.h"

namespace {

// Returns nullptr, or the reason why the driver cannot run this build.
const char* why_not() {
  static char reason[128];
  int driver = 0, required = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "this machine has no NVIDIA driver";
  cudaRuntimeGetVersion(&required);
  if (driver / 1000 >= required / 1000) return nullptr;  // a driver runs every build of its major version
  snprintf(reason, sizeof reason, "the NVIDIA driver is too old: it serves CUDA %d.%d, the kernels were built by %d.%d",
           driver / 1000, driver % 1000 / 10, required / 1000, required % 1000 / 10);
  return reason;
}

KERNEL(why_not)

}  // namespace
