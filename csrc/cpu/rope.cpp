// Rotates heads by their positions on the CPU; kernels/rope.py defines it, rope.h has the rotation. A thread takes
// tokens, W elements of a head in each vector. Floor: one read and one write of memory. A token's results depend on
// that token alone.
#include "rope.h"

#include "dtypes.h"

namespace {

template <class X>
void rope_tokens(const X* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin, X* out,
                 int64_t N, int64_t heads, int64_t d, int64_t half_dim, int64_t num_rotated, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && N * heads * d > 32768)
  for (int64_t n = 0; n < N; ++n) {
    const X* const from = x + n * token_stride;
    X* const to = out + n * heads * d;
    for (int64_t h = 0; h < num_rotated; ++h)
      rope_head(from + h * head_stride, cos + n * half_dim, sin + n * half_dim, half_dim, d, to + h * d);
    if (head_stride == d)
      memcpy(to + num_rotated * d, from + num_rotated * d, (heads - num_rotated) * d * sizeof(X));
    else
      for (int64_t h = num_rotated; h < heads; ++h) memcpy(to + h * d, from + h * head_stride, d * sizeof(X));
  }
}

// x: N tokens of heads, token_stride and head_stride elements apart, of which the first num_rotated are rotated and the
// others copied. cos, sin: (N, half_dim). `out` is contiguous.
void rope(uintptr_t x, int64_t token_stride, int64_t head_stride, bool is_bf16, uintptr_t cos, uintptr_t sin,
          uintptr_t out, int64_t N, int64_t heads, int64_t d, int64_t half_dim, int64_t num_rotated, int threads) {
  const float *const c = ptr<const float>(cos), *const s = ptr<const float>(sin);
  if (is_bf16)
    rope_tokens(ptr<const bf16>(x), token_stride, head_stride, c, s, ptr<bf16>(out), N, heads, d, half_dim, num_rotated,
                threads);
  else
    rope_tokens(ptr<const float>(x), token_stride, head_stride, c, s, ptr<float>(out), N, heads, d, half_dim,
                num_rotated, threads);
}

KERNEL(rope)

}  // namespace
