// Stands in for CUDA's cuda_fp16.h where g++ compiles csrc/cuda.
#pragma once
#include "simt.h"
