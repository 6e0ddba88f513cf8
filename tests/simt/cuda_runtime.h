// Stands in for CUDA's cuda_runtime.h where g++ compiles csrc/cuda.
#pragma once
#include "simt.h"
