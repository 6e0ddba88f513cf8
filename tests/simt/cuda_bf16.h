// Stands in for CUDA's cuda_bf16.h where g++ compiles csrc/cuda.
#pragma once
#include "simt.h"
