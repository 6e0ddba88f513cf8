// The operations in which the headers of this folder are written, so that CPU and CUDA share their mathematics.
// F is f32, a vector, in csrc/cpu and float in csrc/cuda; both define
//
//     INLINE                    in front of a function
//     Mask<F>                   the type of a comparison, i32 (all bits of a lane) or bool; masks combine by & and |
//     splat<F>(x)               F with x everywhere
//     select(mask, yes, no)     both sides are computed
//     clamp(x, low, high)       a NaN stays a NaN
//     min, max, abs, exp        of F; exp, log and log1p of double
//     reciprocal(x)             1 / x, within an ulp
//     clear_low_bits(x, bits)   x with these bits of its significand set to 0
#pragma once
#if defined(__CUDACC__) || defined(SIMT)
#include "cuda/scalar.cuh"
#else
#include "cpu/simd.h"
#endif
