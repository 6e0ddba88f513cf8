// The gradient by the logits from exponentials in bfloat16, kept by the pass of the statistics: the second pass takes
// no exponential, and a float32 logit need not outlive its block.
//
//     first pass    e^(z - origin) of each token, rounded to bfloat16; the origin of each tile of a row, its running
//     max second pass   p = e^(z - origin) * (e^(origin - max) scale), one factor a tile, and log p from the kept
//     number
//
// The gradient is rounded to bfloat16 for the products anyway; a kept number is off by 2^-9 of itself, and log p by
// 2^-9. Of a softcap the derivative would be lost, so there is none.
#pragma once
#include "softmax_gradient.h"

namespace {

// The exponentials of a row's columns, and the origins of its tiles. It is a record of add_columns.
struct KeptRow {
  bf16* kept;
  float* origins;
  float lowest;  // scaling.lowest

  INLINE void tile(int64_t begin, int n, float max) const {
    origins[begin / TILE] = max;
    if (!(max > -__builtin_inff())) memset(kept + begin, 0, n * sizeof(bf16));  // add_columns skips these
  }
  // Rounds half up, which differs from half to even in one of 65536. The target and what underflows are 0. A NaN may
  // become anything: its row's factors are NaN.
  INLINE void exponentials(int64_t i, int n, f32 e, f32 distance) const {
    const u32 bits = (u32)select(distance > splat(lowest), e, splat(0.f));
    const u16 rounded = __builtin_convertvector((bits + 0x8000u) >> 16, u16);
    if (n >= W)
      memcpy(kept + i, &rounded, sizeof rounded);
    else
      memcpy(kept + i, &rounded, n * sizeof(bf16));
  }
};

// ln e within 1e-4 for 0 < e, finite for 0.
INLINE f32 rough_log(f32 e) {
  const i32 bits = as_int(e) - 0x3f400000;  // the exponent's step is at 0.75
  const f32 n = __builtin_convertvector(bits >> 23, f32), t = as_float((bits & 0x007fffff) + 0x3f400000) - 1.f;
  f32 p = splat(-1.7797336e-01f);
  p = p * t + 3.4237082e-01f;
  p = p * t - 5.0499566e-01f;
  p = p * t + 9.9994948e-01f;
  return p * t + n * 0.693147181f;
}

// Replaces a tile's exponentials by the gradient; `factor` is that of e, and `shift` is log p - ln e.
template <bool ENTROPY>
INLINE void kept_tile_gradient(bf16* x, int n, float factor, float shift, float a, float b, float z_grad) {
  const auto at = [&](f32 e) __attribute__((always_inline)) {
    const f32 y = e * factor;
    return ENTROPY ? y * (a + b * (rough_log(e) + shift)) * z_grad : y;
  };
  int i = 0;
  for (; i + W <= n; i += W) store(x + i, at(load(x + i)));
  if (i < n) store_partial(x + i, at(load_partial(x + i, n - i, 0.f)), n - i);
}

// Replaces the exponentials of a row's columns by the gradient. `target` is counted from the first of them.
inline void kept_row_gradient(const KeptRow& row, int64_t columns, int64_t target, const LogitGrad& grad,
                              const Scaling& scaling) {
  const double by_logit = min(1. / scaling.temperature, 3e38);
  for (int64_t begin = 0; begin < columns; begin += TILE) {
    const int n = (int)min<int64_t>(TILE, columns - begin);
    const double origin = row.origins[begin / TILE],
                 distance = origin < grad.max ? (origin - grad.max) * scaling.unit : 0.;
    const double scale = grad.scale * exp(distance);
    if (grad.b == 0)
      kept_tile_gradient<false>(row.kept + begin, n, (float)(scale * grad.a * by_logit), 0.f, 0.f, 0.f, 0.f);
    else
      kept_tile_gradient<true>(row.kept + begin, n, (float)scale, (float)(distance + grad.log_scale), (float)grad.a,
                               (float)grad.b, (float)by_logit);
  }
  if (target >= 0 && target < columns) store_partial(row.kept + target, splat((float)(grad.target * by_logit)), 1);
}

}  // namespace
