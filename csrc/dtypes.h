// The numbers by which Python names a tensor's dtype. csrc/cpu takes them as a bool, is_bf16; only csrc/cuda has
// float16.
#pragma once
#include "kernel.h"

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };

CONSTANT(dtype_float32, FLOAT32)
CONSTANT(dtype_bfloat16, BFLOAT16)
