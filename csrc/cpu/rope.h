// Rotary position embedding of one head (Su et al. 2021), in halves, as Llama and NeoX pair the dimensions.
#pragma once
#include "simd.h"

namespace {

// The first 2 * half of d elements of x are rotated, element i with i + half, the others copied, into y; y may be x.
template <class X, class Y>
INLINE void rope(const X* x, const float* cos, const float* sin, int64_t half, int64_t d, Y* y) {
  for (int64_t i = 0; i < half; i += W) {
    const int n = (int)min<int64_t>(W, half - i);
    const bool whole = n == W;
    const f32 a = whole ? load(x + i) : load_part(x + i, n, 0.f);
    const f32 b = whole ? load(x + half + i) : load_part(x + half + i, n, 0.f);
    const f32 c = whole ? load(cos + i) : load_part(cos + i, n, 0.f);
    const f32 s = whole ? load(sin + i) : load_part(sin + i, n, 0.f);
    const f32 first = a * c - b * s, second = b * c + a * s;
    if (whole) {
      store(y + i, first);
      store(y + half + i, second);
    } else {
      store_part(y + i, first, n);
      store_part(y + half + i, second, n);
    }
  }
  if ((const void*)x == (const void*)y) return;
  int64_t i = 2 * half;
  for (; i + W <= d; i += W) store(y + i, load(x + i));
  if (i < d) store_part(y + i, load_part(x + i, (int)(d - i), 0.f), (int)(d - i));
}

// In place; what lies beyond the first 2 * half elements stays.
template <class X>
INLINE void rotate(X* head, const float* cos, const float* sin, int64_t half) {
  rope(head, cos, sin, half, 2 * half, head);
}

}  // namespace
