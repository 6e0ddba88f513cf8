// Rotary position embedding of one head (Su et al. 2021), in halves, as Llama and NeoX pair the dimensions.
#pragma once
#include "simd.h"

namespace {

// Rotates the first 2 * half_dim of the d elements of x, element i with element i + half_dim, into y, and copies the
// rest. y may be x.
template <class X, class Y>
INLINE void rope_head(const X* x, const float* cos, const float* sin, int64_t half_dim, int64_t d, Y* y) {
  for (int64_t i = 0; i < half_dim; i += W) {
    const int n = (int)min<int64_t>(W, half_dim - i);
    const bool is_full = n == W;
    const f32 a = is_full ? load(x + i) : load_partial(x + i, n, 0.f);
    const f32 b = is_full ? load(x + half_dim + i) : load_partial(x + half_dim + i, n, 0.f);
    const f32 c = is_full ? load(cos + i) : load_partial(cos + i, n, 0.f);
    const f32 s = is_full ? load(sin + i) : load_partial(sin + i, n, 0.f);
    const f32 first = a * c - b * s, second = b * c + a * s;
    if (is_full) {
      store(y + i, first);
      store(y + half_dim + i, second);
    } else {
      store_partial(y + i, first, n);
      store_partial(y + half_dim + i, second, n);
    }
  }
  if ((const void*)x == (const void*)y) return;
  int64_t i = 2 * half_dim;
  for (; i + W <= d; i += W) store(y + i, load(x + i));
  if (i < d) store_partial(y + i, load_partial(x + i, (int)(d - i), 0.f), (int)(d - i));
}

// Rotates the first 2 * half_dim elements of a head in place.
template <class X>
INLINE void rope_in_place(X* head, const float* cos, const float* sin, int64_t half_dim) {
  rope_head(head, cos, sin, half_dim, 2 * half_dim, head);
}

}  // namespace
