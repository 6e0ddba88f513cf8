// Rotary position embedding of one head (Su et al. 2021), in halves, as Llama and NeoX pair the dimensions.
#pragma once
#include "simd.h"

namespace {

// Rotates elements i to half_dim with elements i + half_dim to 2 * half_dim, N of them at a time and the last few in
// vectors of half the size: a masked load or store takes longer than any of them.
template <int N = W, class X, class Y>
INLINE void rotate_from(int64_t i, const X* x, const float* cos, const float* sin, int64_t half_dim, Y* y) {
  for (; i + N <= half_dim; i += N) {
    const auto a = load<N>(x + i), b = load<N>(x + half_dim + i), c = load<N>(cos + i), s = load<N>(sin + i);
    store(y + i, a * c - b * s);
    store(y + half_dim + i, b * c + a * s);
  }
  if constexpr (N > 1) rotate_from<N / 2>(i, x, cos, sin, half_dim, y);
}

// Rotates the first 2 * half_dim of the d elements of x, element i with element i + half_dim, into y, and copies the
// rest. y may be x.
template <class X, class Y>
INLINE void rope_head(const X* x, const float* cos, const float* sin, int64_t half_dim, int64_t d, Y* y) {
  rotate_from(0, x, cos, sin, half_dim, y);
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
